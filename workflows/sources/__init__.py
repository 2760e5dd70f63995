"""Source pictures: their places in a manifest, their bytes, and upright RGB within bounds.

A picture that cannot be used raises RowError. Knows the files of an output only as `storage` paths, and
no manifest format, plan or Ray.
"""
