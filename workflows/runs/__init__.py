"""Runs: the Ray Data pipeline from planned shards to written shards, and the driver that feeds it.

Knows how a shard travels, not what is in a row: `plans` decides that and `outputs` writes it. In order:

    driver      the run: lock, plan, pipeline, end
    setup       what is resolved once at the start
    resume      the shards that are left
    feed        numbers of shards, admitted into the pipeline one by one
    pool        the replicas, and the stages around them
    stages      load, encode and write, as functions of one shard; requests: the load stage
    streaming   rows of the pipeline as they arrive
    monitor     counts them, reports progress, ends a run that fails
"""
