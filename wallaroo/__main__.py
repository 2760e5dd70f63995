"""`python -m wallaroo`: the `wallaroo` command."""

from wallaroo.jobs.cli import main

main()
