"""Training: the image tokenizer and the published stages (arXiv 2603.04980) in one loop.

The rows of a step and the draws for each depend on seed and step alone, not on the number of processes.
Knows nothing of Ray, Parquet or object stores: rows are dicts, and whoever starts it brings them.
"""
