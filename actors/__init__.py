"""One model replica behind a Ray actor, the watch of a run, and the rows that cross between them.

Knows nothing of manifests, output folders or storage.
"""
