"""The `wallaroo` command and its run configuration: the only readers of argv and environment."""
