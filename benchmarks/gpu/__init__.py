"""GPU benchmarks: sections that `measure_gpu.py` runs, each a function of a Section.

They do not use pytest, because a GPU is often available for minutes only: sections run in order of
importance, each has a deadline, and everything not reached is recorded with the reason. The device
is a parameter, so all of it can be rehearsed on a CPU.
"""
