"""Runs: the Ray Data pipeline from planned shards to written shards, and the driver that feeds it.

Knows how a shard travels, not what is in a row: `plans` decides that and `outputs` writes it.
"""
