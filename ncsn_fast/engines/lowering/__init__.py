"""From a network to a list of operations on maps: what the cpu and cuda engines run."""
