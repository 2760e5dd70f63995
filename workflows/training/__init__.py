"""Training on Ray: a stage of a recipe in the workers of Ray Train, on rows in Parquet.

Knows recipes and Parquet files. Losses, loop and states are those of `wallaroo.model.training`.
"""
