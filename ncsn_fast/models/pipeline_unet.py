"""PipelineUNet: a model or a sampler as the `unet` of a pipeline of diffusers."""

from __future__ import annotations

import types
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ncsn_fast.diffusion import schedule
from ncsn_fast.models.score import ScoreModel

_PREDICTS = ("epsilon", "sample", "v_prediction")


class _Sampler(Protocol):
    model: ScoreModel

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Computes grad log p_sigma(x), shape of x."""


def betas_of(model: ScoreModel, n: int = 1000) -> list[float]:
    """Returns betas of a chain with the noise levels of a model, for schedulers.

    With sigma_0 < ... < sigma_{n-1} geometric between the ends of the model's ladder, for images
    in [-1, 1], the chain has alphas_cumprod_i = 1 / (1 + sigma_i^2).

    Args:
        n: number of timesteps.
    """
    ends = float(model.sigmas[0]), float(model.sigmas[-1])
    sigmas = 2 * schedule.geometric(*ends, n).double().flip(0)
    kept = 1 / (1 + sigmas.square())
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return (1 - kept / before).tolist()


class PipelineUNet(nn.Module):
    """The network of a pipeline of diffusers, computed by a model or a sampler of this package.

    Called with states of a scheduler's chain, sqrt(a) (2 x_0 - 1) + sqrt(1 - a) z with a =
    alphas_cumprod[timestep], it returns what the scheduler expects as the prediction: the noise z,
    the sample or v. For ScoreSdeVeScheduler states are x_0 + sigma z, and it returns the score. A
    ScoreModel gives gradients, in plain PyTorch; a Sampler none, and runs its engine.

    Args:
        source: a ScoreModel or a Sampler.
        scheduler: that of the pipeline.

    Raises:
        ValueError: the scheduler is of another kind, or its noise goes beyond that of the model.
    """

    def __init__(self, source: ScoreModel | _Sampler, scheduler: Any) -> None:
        super().__init__()
        self.source = source  # a module of this module, where it is one
        model = source if isinstance(source, ScoreModel) else source.model
        height, width = model.config.image_size
        self.config = types.SimpleNamespace(
            sample_size=height if height == width else (height, width),
            in_channels=model.config.channels,
            out_channels=model.config.channels,
        )
        self.dtype = torch.float32
        self._sigmas: NDArray[np.float64] | None = None  # of each timestep of a chain
        if type(scheduler).__name__ == "ScoreSdeVeScheduler":
            largest = float(scheduler.config.sigma_max)
        elif getattr(scheduler, "alphas_cumprod", None) is not None:
            self._predicts = scheduler.config.get("prediction_type", "epsilon")
            if self._predicts not in _PREDICTS:
                raise ValueError(
                    f"prediction_type must be one of {', '.join(_PREDICTS)}; got "
                    f"{self._predicts!r:.60}"
                )
            kept = scheduler.alphas_cumprod.double().cpu().numpy()
            self._sigmas = np.sqrt((1 - kept) / kept)
            largest = float(self._sigmas[-1]) / 2
        else:
            raise ValueError(
                f"scheduler {type(scheduler).__name__!r} is not known: ScoreSdeVeScheduler and "
                "those with alphas_cumprod are (DDPM, DDIM, Euler, ...)"
            )
        if not largest <= (own := float(model.sigmas[0])) * 1.01:
            raise ValueError(
                f"the noise of this scheduler goes to {largest:.4g}, in the unit of images in "
                f"[0, 1], and that of the model to {own:.4g}: give the scheduler "
                "trained_betas=betas_of(model), or sigma_max"
            )

    @property
    def device(self) -> torch.device:
        """Device of the states that a pipeline draws."""
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True, **_: Any
    ) -> Any:
        """Computes the prediction, shape of the states.

        Args:
            sample: states (N, C, H, W).
            timestep: of the chain, or the noise level of ScoreSdeVeScheduler; a number or (N,).

        Returns:
            an object with the prediction as `sample`; a tuple of it unless return_dict.
        """
        at = torch.as_tensor(timestep).detach().double().cpu().flatten().expand(len(sample))
        chain = self._sigmas
        found = self._score(sample, at) if chain is None else self._of_chain(sample, at, chain)
        return types.SimpleNamespace(sample=found) if return_dict else (found,)

    def _score(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.source.score(x, sigma.float().to(x.device)).to(x)

    def _of_chain(self, u: Tensor, timestep: Tensor, sigmas: NDArray[np.float64]) -> Tensor:
        """Computes the prediction for states of a chain of images in [-1, 1]."""
        logs = np.interp(timestep.numpy(), np.arange(len(sigmas)), np.log(sigmas))
        sigma = torch.from_numpy(np.exp(logs))
        row = (-1, *[1] * (u.ndim - 1))
        kept = (1 / (1 + sigma.square()).sqrt()).view(row).to(u)  # sqrt(a)
        std = (sigma.view(row).to(u)) * kept  # sqrt(1 - a)
        x = (u / kept + 1) / 2
        noise = self._score(x, sigma / 2) * (-sigma / 2).view(row).to(u)
        if self._predicts == "epsilon":
            return noise
        clean = (u - std * noise) / kept
        return clean if self._predicts == "sample" else kept * noise - std * clean
