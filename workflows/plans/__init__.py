"""Plans: every output row decided, checked, seeded and numbered before a replica starts.

Knows manifests and the tokenizer of a checkpoint. Knows no replica and no result. In the order of a run:

    settings    the options that a plan depends on
    planner     manifest -> plan, where rows are missing; checks: the plan in the output fits the run
    scanned     the files scanned, columns (`columns`) and `where` checked, rows selected
    counts      planned rows of each piece, and rows that repeat an id
    rounds      a round cut into parts, which are committed in order; growing: rounds of `--incremental`
    parts       one part, planned and written by a Ray task; layout: rows of a shard, shards of a file
    rows        a table of rows: ids, samples, seeds; parameters: one row; values: one cell
    plan        the plan read back; finished: whether an output has all of it

`passes` runs a function in Ray tasks. `increments` finds new rows. `dataset` plans a Ray Dataset instead.
"""
