"""The GPU benchmarks: sections that `measure_gpu.py` runs, each a function of a Section.

They are no pytest benchmarks, because a GPU is often at hand for minutes only: sections go by
importance, every one has a deadline, and what was not reached is written down with its reason.
Which device they run on is one variable, so all of it can be rehearsed on a CPU.
"""
