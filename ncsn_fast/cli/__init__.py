"""What the commands share: options, arguments, sample folders, shards."""
