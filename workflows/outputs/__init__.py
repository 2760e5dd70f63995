"""Outputs: the names of their files, the columns of `data/`, shards, the lock and the run log.

Knows neither manifests nor how a plan is made. `layout` alone spells the name of a file.
"""
