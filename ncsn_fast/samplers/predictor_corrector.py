"""Predictor-corrector sampling of VE-SDEs (Song et al. 2021, algorithms 1, 2 and 4).

At each sigma_i, with s the score at the current state and z fresh,
    predictor  x + b s + c z, which removes the variance G_i^2 = sigma_i^2 - sigma_{i+1}^2:
        reverse_diffusion   b = G^2,      c = G
        ancestral           b = G^2,      c = G sigma_{i+1} / sigma_i
        flow                b = G^2 / 2,  c = 0        (Euler's step along the probability flow)
    corrector  x + alpha s + sqrt(2 alpha) z, any number of times:
        langevin            alpha = 2 (snr |z| / |s|)^2,  norms over the elements of a sample
        annealed            alpha = 2 (snr sigma_i)^2
The last predictor step goes to sigma = 0; without its noise it is Tweedie's denoising.
The published code averages |z| and |s| over the batch, so a sample depends on its batch;
norm="sample" uses each sample's own. NFE = L (predictor + corrector_steps).
Any other `Move` that keeps p_sigma can replace the corrector.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ncsn_fast.diffusion.spacing import check_ladder
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.choices import SNR, Corrector, Norm, Order, Predictor
from ncsn_fast.samplers.procedure import Constrain, Draw, OnStep, Result, Score, per_sample


class Moved(NamedTuple):
    """States after a corrector.

    x: (B, ...).   mean: the same without the last noise, or x.
    """

    x: Tensor
    mean: Tensor


class Move(Protocol):
    """Corrector: moves states at one noise level and keeps their distribution p_sigma.

    Attributes:
        nfe: score evaluations per move; a move also owns that many noise steps.
    """

    @property
    def nfe(self) -> int:
        """Score evaluations per move."""

    def __call__(
        self, score: Callable[[Tensor], Tensor], x: Tensor, sigma: float, step: int
    ) -> Moved:
        """Moves x (B, ...); score(x) is at sigma, and `step` is the first noise step to use."""


def predictor_corrector(
    score: Score,
    x: Tensor,
    sigmas: ArrayLike,
    draw: Draw,
    *,
    predictor: Predictor = "reverse_diffusion",
    corrector: Corrector | Move = "langevin",
    corrector_steps: int = 1,
    order: Order = "corrector_first",
    snr: float = SNR,
    norm: Norm = "batch",
    noise_norm: Literal["drawn", "expected"] = "drawn",
    variances: ArrayLike | None = None,
    denoise: bool = True,
    count: int | None = None,
    constrain: Constrain | None = None,
    on_level: OnStep | None = None,
) -> Result:
    """Runs the states x (B, ...) down the noise levels sigmas (L,); see the module docstring.

    Args:
        draw: noise: stream 0 for the predictor, 4 for the corrector, step = evaluation index.
        order: order within a level; the published code corrects first.
        snr: "signal-to-noise ratio" r of the corrector's step.
        norm: norms that set langevin's step; see the module docstring.
        noise_norm: |z| of the drawn noise, or its expected value sqrt(D), as in the tutorials.
        variances: (L,) G_i^2, in place of the differences of sigmas^2; g(t_i)^2 dt makes reverse
            diffusion Euler-Maruyama of the reverse SDE.
        denoise: return the last update without its noise.   count: as in `langevin_step`.
        constrain: applied to the start at sigma_1, at sigma_i after a corrector, at sigma_{i+1}
            after a predictor, and at 0 to the mean that is returned.
        on_level: called after each level with (evaluations done, sigma_i, state).
    """
    levels = _levels(sigmas, variances)
    check_options(predictor, corrector, order, norm, noise_norm, corrector_steps, snr)
    if isinstance(corrector, str):
        corrector = _Langevin(draw, snr, norm, noise_norm == "expected", count, corrector)
    parts = ["corrector"] * corrector_steps + ["predictor"] * (predictor != "none")
    if order == "predictor_first":
        parts.reverse()
    constrain = constrain or (lambda x, sigma, step: x)
    x = constrain(x, levels[0][0], 0)
    k, mean = 0, x
    for sigma, end, g2 in levels:
        score_here = _at(score, sigma)
        for part in parts:
            if part == "predictor":
                b, c = _prediction(predictor, sigma, g2)
                mean = x + b * score_here(x)
                x = mean + c * draw(Stream.SAMPLER, k).to(x.dtype) if c else mean
            else:
                x, mean = corrector(score_here, x, sigma, k)
            k += 1 if part == "predictor" else corrector.nfe
            x = constrain(x, end if part == "predictor" else sigma, k)
        if on_level is not None:
            on_level(k, sigma, x)
    mean = constrain(mean, 0.0, k)
    nfe = torch.full((len(x),), k, dtype=torch.int64, device=x.device)
    return Result(mean if denoise else x, nfe)


def _at(score: Score, sigma: float) -> Callable[[Tensor], Tensor]:
    """Returns the score function at one noise level."""
    return lambda x: score(x, torch.full((len(x),), sigma, dtype=x.dtype, device=x.device))


@dataclasses.dataclass(frozen=True)
class _Langevin:
    """Step of the published correctors, with noise of stream 4."""

    draw: Draw
    snr: float
    norm: Norm
    expected: bool
    count: int | None
    name: str
    nfe: int = 1

    def __call__(
        self, score: Callable[[Tensor], Tensor], x: Tensor, sigma: float, step: int
    ) -> Moved:
        s, z = score(x), self.draw(Stream.CORRECTOR, step).to(x.dtype)
        if self.name == "annealed":
            alpha = x.new_full((len(x),), 2 * (self.snr * sigma) ** 2)
        else:
            alpha = langevin_step(s, z, self.snr, self.norm, self.count, expected=self.expected)
        mean = x + per_sample(alpha, x) * s
        return Moved(mean + per_sample((2 * alpha).sqrt(), x) * z, mean)


def langevin_step(
    score: Tensor,
    noise: Tensor,
    snr: float,
    norm: Norm = "batch",
    count: int | None = None,
    *,
    expected: bool = False,
) -> Tensor:
    """Computes alpha = 2 (snr |z| / |s|)^2, (B,) float64.

    Args:
        count: number of rows that norm="batch" averages over, the others being padding; None for
            all.
        expected: use sqrt(D), the root mean square of |z|, in place of |z|.
    """
    lengths = score.flatten(1).double().norm(dim=1)
    drawn = noise.flatten(1).double().norm(dim=1)
    if expected:
        drawn = torch.full_like(drawn, math.sqrt(math.prod(noise.shape[1:])))
    if norm == "batch":
        lengths, drawn = (v[:count].mean().expand_as(v) for v in (lengths, drawn))
    return 2 * (snr * drawn / lengths).square()


def annealed_snr(epsilon: float, sigma_min: float) -> float:
    """Computes snr = sqrt(epsilon / 2) / sigma_L.

    With it the annealed corrector is annealed Langevin dynamics with step size epsilon.
    """
    return math.sqrt(epsilon / 2) / sigma_min


def evaluations(
    n_sigmas: int, predictor: Predictor, corrector_steps: int, corrector_nfe: int = 1
) -> int:
    """Computes the NFE of a run in advance; corrector_nfe is the NFE of one corrector step."""
    return n_sigmas * (corrector_steps * corrector_nfe + (predictor != "none"))


def _prediction(predictor: Predictor, sigma: float, g2: float) -> tuple[float, float]:
    """Returns b and c of a predictor step."""
    if predictor == "flow":
        return g2 / 2, 0.0
    if predictor == "ancestral":
        left = max(sigma**2 - g2, 0.0)  # sigma_{i+1}^2
        return g2, math.sqrt(g2 * left) / sigma
    return g2, math.sqrt(g2)


def _levels(sigmas: ArrayLike, variances: ArrayLike | None) -> list[tuple[float, float, float]]:
    """Returns (sigma_i, sigma_{i+1}, G_i^2) of every level; the last sigma_{i+1} is 0."""
    ladder = check_ladder(np.asarray(sigmas))
    after = np.append(ladder[1:], 0.0)
    removed = ladder**2 - after**2
    if variances is not None:
        removed = np.asarray(variances, dtype=np.float64)
        if removed.shape != ladder.shape or not (np.isfinite(removed) & (removed >= 0)).all():
            raise ValueError(
                f"variances must be ({len(ladder)},), finite and not negative; got {variances!r}"
            )
    return list(zip(ladder.tolist(), after.tolist(), removed.tolist(), strict=True))


def check_options(
    predictor: str,
    corrector: str | Move,
    order: str,
    norm: str,
    noise_norm: str,
    corrector_steps: int,
    snr: float,
    also: tuple[str, ...] = (),
) -> None:
    """Raises ValueError for invalid options of `predictor_corrector`.

    Args:
        also: names of further correctors that the caller supports.
    """
    known = {
        "predictor": (predictor, ("reverse_diffusion", "ancestral", "flow", "none")),
        "corrector": (
            "langevin" if callable(corrector) else corrector,
            ("langevin", "annealed", *also),
        ),
        "order": (order, ("corrector_first", "predictor_first")),
        "norm": (norm, ("batch", "sample")),
        "noise_norm": (noise_norm, ("drawn", "expected")),
    }
    for name, (value, values) in known.items():
        if value not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}; got {value!r}")
    if operator.index(corrector_steps) < 0 or not 0 < snr < math.inf:
        raise ValueError(
            f"expected corrector_steps >= 0 and snr > 0; got {corrector_steps} and {snr}"
        )
