"""Plans: every output row decided, checked, seeded and numbered before a replica starts.

Knows manifests and the tokenizer of a checkpoint. Knows no replica and no result.
"""
