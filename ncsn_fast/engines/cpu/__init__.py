"""CPU engine: plans, autotuning and execution."""
