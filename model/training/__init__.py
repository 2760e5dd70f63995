"""Training: the image tokenizer and the published stages (arXiv 2603.04980) in one loop.

The rows of a step and what is drawn for each depend on seed and step alone, not on the number of processes.
Knows nothing of Ray, Parquet or object stores: the caller gives rows as dicts.
"""
