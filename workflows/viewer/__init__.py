"""`wallaroo view`: a web page over one or several outputs, local or on S3, finished or running.

    shards    reads Parquet shards: small columns, single rows, pictures
    index     a local DuckDB file with the small columns, filled shard by shard
    query     search, filter, facets, order and keyset paging as SQL
    output    one output: its listing, the status of its run, its pages
    compare   rows of several outputs side by side
    votes     which row was preferred, in a Parquet file
    again     the command that repeats a row, and the sources of a row
    state     everything a viewer holds while it runs
    guard     which requests are answered
    pages     HTML; app: routes; server: the socket

The first page is read from the first shard alone. Everything else asks the index, which a background thread
fills after the first page. The viewer writes votes and its index, nothing else.
"""
