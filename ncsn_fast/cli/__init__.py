"""Shared parts of the commands: options, arguments, sample folders, shards."""
