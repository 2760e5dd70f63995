"""`python -m wallaroo`: the `wallaroo` command."""

import os
import sys

# `python -m` puts the working directory first; a user's files there are data, not modules.
if sys.path[0] == os.getcwd():
    del sys.path[0]

from wallaroo.jobs.cli import main

main()
