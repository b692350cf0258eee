"""Shared parts of the commands (the files beside this folder): options, arguments, shards."""
