"""Training loss of a model: what DistributedDataParallel wraps and torch.compile compiles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncsn_fast.diffusion.objectives import (
    continuous_score_matching,
    denoising_score_matching,
    levels_of,
    times_of,
    weighted_score_matching,
)
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.training.weighting import Weighting


class Objective(nn.Module):
    """Denoising score matching at random levels, or times, one loss per image.

    Its numbers come from outside, so that nothing in it depends on a generator or waits for the
    device.

    Args:
        anneal_power: p of the weight sigma^p of a level; times have the weight sigma^2, and U-Nets
            of score_sde and EDM their own (weighting.py).
    """

    def __init__(self, model: ScoreModel, anneal_power: float) -> None:
        super().__init__()
        self.model, self.anneal_power = model, anneal_power
        config = model.config
        self.weighting = Weighting(config) if isinstance(config, UNetConfig) else None

    def forward(
        self, x: Tensor, uniform: Tensor, noise: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the levels, for continuous times the nearest ones, and the losses, both (B,).

        Args:
            x: clean images (B, C, H, W) in [0, 1].
            uniform: (B,) in [0, 1), selects the level or time.
            noise: standard normal, shape of x.
            labels: (B,) int64, for networks with classes; n_classes means no class.
        """
        model = self.model
        if labels is not None and not model.n_classes:
            raise ValueError("this network has no classes: leave the labels out")

        def score(x: Tensor, sigma: Tensor) -> Tensor:  # ScoreModel.score waits for the device
            return model.score_by(lambda u, condition: model(u, condition, labels), x, sigma)

        if self.weighting is not None:
            sigma = self.weighting.sigma(uniform)
            row = sigma.view(-1, *[1] * (x.ndim - 1))
            losses = weighted_score_matching(
                lambda x, sigma: row * score(x, sigma), x, sigma, noise,
                self.weighting.weight(sigma),
            )  # fmt: skip
            return model.nearest_level(sigma), losses
        if (clock := model.clock) is not None:
            t = times_of(uniform, clock.t_min)
            std = clock.std(t).float()
            losses = continuous_score_matching(self._score_at_time, x, t, std, noise)
            return model.nearest_level(std), losses
        level, sigmas = levels_of(uniform, len(model.sigmas)), model.sigmas
        losses = denoising_score_matching(
            lambda x, level: score(x, sigmas[level]), x, sigmas, level, noise,
            anneal_power=self.anneal_power,
        )  # fmt: skip
        return level, losses

    def _score_at_time(self, x: Tensor, t: Tensor) -> Tensor:
        assert self.model.clock is not None
        return self.model(x, t) / self.model.clock.std(t).to(x.dtype)[:, None, None, None]


def stratified(places: Tensor) -> Tensor:
    """Returns evenly spread numbers in [0, 1) float32 for places (B,): frac(i / golden ratio).

    The held-out images have the same levels whenever their loss is taken.
    """
    return torch.frac((places.double() + 0.5) * 0.6180339887498949).float().clamp(max=1 - 2**-24)
