"""Manifests: their files found, and their rows read piece by piece with one Arrow schema.

Knows what a cell may hold, not what a row means: sampling, sizes and seeds are resolved in `plans`.
"""
