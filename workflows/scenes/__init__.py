"""Drawn scenes: a small world with captions, edits and questions, its data set, and its scores.

The embedded model is trained and evaluated on them. Knows no run.
"""
