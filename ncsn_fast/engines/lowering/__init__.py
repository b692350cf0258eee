"""Lowering of a network to operations on feature maps, which the cpu and cuda engines run."""
