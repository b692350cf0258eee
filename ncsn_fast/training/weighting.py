"""Noise levels that a U-Net is trained at, and the weights of their losses, as published.

    VE            sigma(t) with t uniform on [1e-5, 1]; 1/2
    VP, sub-VP    the noise level at time t, likewise; 1 / number of elements
    a discrete chain or ladder                  its levels, each as often; as above
    EDM           log sigma normal, with mean -1.2 and deviation 1.2; (sigma^2 + d^2) / d^2

for the loss of `weighted_score_matching`. EDM's sigma, and d, the standard deviation of the data,
are in the network's unit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncsn_fast.diffusion.objectives import levels_of, times_of
from ncsn_fast.diffusion.parameterisation import DiscreteVP
from ncsn_fast.diffusion.sde import SDE, VE
from ncsn_fast.models.unet_config import UNetConfig

_T_MIN = 1e-5
_P_MEAN, _P_STD = -1.2, 1.2  # Karras et al. 2022, table 1


class Weighting:
    """Levels and weights of one kind of network.

    Args:
        config: of the model.
    """

    def __init__(self, config: UNetConfig) -> None:
        spec = config.parameterisation.spec
        assert spec is not None
        self.scale = config.parameterisation.data_scale
        self.sigma_data = float(spec["sigma_data"]) if spec["predicts"] == "edm" else None
        process = getattr(config.parameterisation.c_noise, "process", None)
        discrete = spec["sees"] == "level" or isinstance(process, DiscreteVP)
        self.ladder = config.ladder().double() if discrete else None
        self.process: SDE | None = process if isinstance(process, SDE) else None
        if self.process is None and not discrete:
            self.process = VE(config.sigma_end * self.scale, config.sigma_begin * self.scale)
        self.constant = 1 / math.prod(config.sample_shape) if process is not None else 0.5

    def sigma(self, uniform: Tensor) -> Tensor:
        """Maps uniforms (N,) in [0, 1) to noise levels in the unit of x, float32."""
        if self.sigma_data is not None:
            # float32 has 0 and no 1: the quantile stays finite.
            normal = torch.special.ndtri(uniform.double().clamp(min=2**-25))
            found = (_P_MEAN + _P_STD * normal).exp() / self.scale
        elif self.ladder is not None:
            ladder = self.ladder.to(uniform.device)
            found = ladder[levels_of(uniform, len(ladder))]
        else:
            assert self.process is not None
            t = times_of(uniform, _T_MIN).double()
            found = self.process.noise_level(t) / self.scale
        return found.float()

    def weight(self, sigma: Tensor) -> Tensor:
        """Computes the weights (N,) of noise levels."""
        if self.sigma_data is None:
            return torch.full_like(sigma, self.constant)
        return ((self.scale * sigma).square() + self.sigma_data**2) / self.sigma_data**2
