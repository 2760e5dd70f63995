"""The commands of `wallaroo`, by what they are for. `jobs.cli` puts them together.

Each reads its arguments, calls one workflow and turns its result into lines and an exit code. Libraries of
weight are imported inside the functions, so that `wallaroo --help` answers at once.
"""
