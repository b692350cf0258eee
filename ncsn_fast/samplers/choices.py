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
FAST_STEPS, FAST_ETA = 30, 4.0  # number of levels of `fast`, and its eta
