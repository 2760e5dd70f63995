"""Training on Ray: a stage of a recipe in the workers of Ray Train, on rows that Ray Data reads.

Knows recipes and Parquet files. Losses, loop and states are those of `wallaroo.model.training`.
"""
