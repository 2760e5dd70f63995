"""Ray Data pipelines from a manifest to a data set, and the files they read and write.

Knows nothing of argv, environment variables or exit codes.
"""
