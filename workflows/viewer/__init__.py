"""`wallaroo view`: a page over one or several outputs, local or on S3, finished or running.

    shards    Parquet files of an output: small columns, single rows, pictures
    index     a local DuckDB file of the small columns, built shard by shard
    query     search, filter, facets, order and keyset paging as SQL
    output    one output: its listing, its status, its index, a page of it
    compare   rows of several outputs side by side; votes: what was preferred
    again     the command that makes a row again, and where its source came from
    app       addresses, guard and pages; server: the socket

The first page needs neither the index nor the footers of other shards: it is read from the first shard.
Everything else asks the index, which a thread fills meanwhile. Nothing is written but votes and the index.
"""
