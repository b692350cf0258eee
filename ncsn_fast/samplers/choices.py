"""Named choices and defaults of the methods' options.

They are apart from the samplers that use them, because the command line lists them before torch is
imported.
"""

from __future__ import annotations

from typing import Literal

Form = Literal["code", "paper"]  # of the Langevin step
Predictor = Literal["reverse_diffusion", "ancestral", "flow", "none"]
Corrector = Literal["langevin", "annealed"]
Chain = Literal["ula", "mala", "hmc"]  # of correctors.CORRECTORS
Order = Literal["corrector_first", "predictor_first"]
Variance = Literal["posterior", "forward"]  # of the noise of ancestral sampling
Norm = Literal["batch", "sample"]
SNR = 0.16  # of the published VE samplers
# `fast`, chosen from what benchmarks/fit_fast.py measures: its number of levels; eta and the weight
# of the history at evenly spread knots, from the first row to the last; weight of the extrapolation
# in the step to 0.
FAST_STEPS, FAST_ETA, FAST_HISTORY, FAST_FINAL = 15, (2.0, 5.0, 7.0, 7.0), (1.2, 1.15, 0.9), 0.2
