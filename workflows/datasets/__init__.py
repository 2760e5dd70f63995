"""Data sets made from finished outputs: selected, exported into other formats, compacted.

Knows outputs and manifests. Starts no replica.
"""
