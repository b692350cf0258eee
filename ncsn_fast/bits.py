"""Log-likelihoods of images under a model, one batch at a time, and their running mean.

Images of 8-bit levels are dequantised (likelihood.py), so that bits per dimension bound what a
code for the levels needs; float images are densities' arguments as they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ncsn_fast import data, noise
from ncsn_fast.files import atomic_write
from ncsn_fast.images import as_tensor
from ncsn_fast.jobs import default_batch_size
from ncsn_fast.likelihood import Likelihood, Trace, dequantise, log_likelihood
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.samplers.plain import Score

BITS, DATA_RANGE = 8, (0.0, 1.0)  # of images as this package reads them
MOST_AT_ONCE = 64  # images in a batch: their gradients take memory, too


def model_ends(model: ScoreModel) -> tuple[float, float]:
    """sigma_min and sigma_max of the model's probability flow.

    The ends of its ladder or, where it knows the time, the noise at the ends of the times that it
    was trained on.

    Raises:
        ValueError: the network knows no levels between its own.
    """
    if model.conditioning == "level":
        raise ValueError(
            f"{model.config.arch} (NCSN 2019) knows the score at its {model.config.n_sigmas} "
            "levels and nowhere between them, so it has no probability flow and no likelihood; "
            "take an NCSNv2 or a network that is conditioned on time"
        )
    if model.clock is not None:
        return float(model.clock.std(model.clock.t_min)), float(model.clock.std(1.0))
    return float(model.sigmas[-1]), float(model.sigmas[0])


def image_log_likelihood(
    model: ScoreModel,
    images: Any,
    *,
    seed: int = 0,
    start: int = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    trace: Trace = "rademacher",
    n_probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    batch_size: int | None = None,
) -> Likelihood:
    """Likelihood of a caller's images under a model; fields (N, ...) on the CPU.

    Args:
        images: uint8 tensor (N, C, H, W), uint8 array (N, H, W, C) or PIL images, which are
            dequantised; or a float tensor (N, C, H, W), taken as it is: density in units of
            [0, 1], and bits for 8-bit levels.
        seed, start: keys of the dequantisation and of the probes: image i is sample start + i, and
            its likelihood does not depend on its neighbours.
        sigma_min, sigma_max: ends of the flow; None for the model's (`model_ends`).
        trace, n_probes, rtol, atol: see likelihood.log_likelihood.
        batch_size: images at once; None for what suits their size.

    Raises:
        ValueError: unfit images, or a model without a probability flow (NCSN 2019).
    """
    low, high = model_ends(model)
    low, high = sigma_min or low, sigma_max or high
    x = as_tensor(images, model.image_shape)
    samples = noise.sample_indices(start, len(x))
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        levels = (x * 255).round().to(torch.uint8)
        x = dequantise(levels, bits=BITS, data_range=DATA_RANGE, seed=seed, samples=samples)
    size = batch_size or _batch_size(len(x), model)
    found = [
        log_likelihood(
            model.score,
            part.to(model.device),
            low,
            high,
            trace=trace,
            n_probes=n_probes,
            seed=seed,
            samples=keys.to(model.device),
            bits=BITS,
            data_range=DATA_RANGE,
            rtol=rtol,
            atol=atol,
        )
        for part, keys in zip(x.split(size), samples.split(size), strict=True)
    ]
    fields = [f.name for f in dataclasses.fields(Likelihood)]
    return Likelihood(**{k: torch.cat([getattr(part, k).cpu() for part in found]) for k in fields})


def _batch_size(n: int, model: ScoreModel) -> int:
    return min(MOST_AT_ONCE, default_batch_size(n, model.image_shape, model.device))


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
    """How a likelihood is computed: what decides its value, but for the images and the model.

    Attributes:
        sigma_min, sigma_max: ends of the flow.
        trace, n_probes, rtol, atol: see likelihood.log_likelihood.   seed: of all noise.
    """

    sigma_min: float
    sigma_max: float
    trace: Literal["rademacher", "gaussian", "exact"] = "rademacher"
    n_probes: int = 1
    rtol: float = 1e-5
    atol: float = 1e-5
    seed: int = 0


def bits_per_dimension(
    score: Score,
    images: data.Images,
    indices: list[int],
    settings: LikelihoodSettings,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[list[int], Likelihood]]:
    """Likelihoods of a data set's 8-bit images: (indices, Likelihood) of each batch, in order.

    Image i is sample i of the seed, so that its value depends on no other image, up to rounding.

    Args:
        score: (x, sigma (B,)) -> score of images in [0, 1], differentiable in x.
        indices: which images.
    """
    options = dataclasses.asdict(settings)
    low, high, seed = (options.pop(name) for name in ("sigma_min", "sigma_max", "seed"))
    for first in range(0, len(indices), batch_size):
        part = indices[first : first + batch_size]
        keys = torch.tensor(part, dtype=torch.int64)
        levels = data.stack(images, part)
        x = dequantise(levels, bits=BITS, data_range=DATA_RANGE, seed=seed, samples=keys)
        yield part, log_likelihood(
            score,
            x.to(device),
            low,
            high,
            seed=seed,
            samples=keys.to(device),
            bits=BITS,
            data_range=DATA_RANGE,
            **options,
        )


class RunningMean:
    """Mean of what came so far, and its standard error, by Welford's recurrence."""

    def __init__(self) -> None:
        self.n, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.n += 1
        gap = value - self.mean
        self.mean += gap / self.n
        self._squares += gap * (value - self.mean)

    @property
    def standard_error(self) -> float:
        """s / sqrt(n), s^2 the unbiased variance; NaN below two values."""
        if self.n < 2:
            return math.nan
        return math.sqrt(self._squares / (self.n - 1) / self.n)


class BitsFile:
    """Likelihoods of a data set's images on disk, one JSON line each, appended batch by batch.

    Attributes:
        found: image index -> its line, {"index", "bpd", "nfe"}.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[int, dict[str, Any]]()
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)
        for line in lines:
            try:
                values = json.loads(line)
                self.found[values["index"]] = values
            except (ValueError, KeyError, TypeError):
                continue  # half a line, where a process was killed: that image is done again
        if len(self.found) < len(lines):
            with atomic_write(path) as temporary:
                temporary.write_text("".join(map(_line, self.found.values())))

    def add(self, indices: list[int], likelihood: Likelihood) -> None:
        """Keeps a batch."""
        values = zip(indices, likelihood.bpd.tolist(), likelihood.nfe.tolist(), strict=True)
        new = [{"index": i, "bpd": bpd, "nfe": nfe} for i, bpd, nfe in values]
        self.found |= {entry["index"]: entry for entry in new}
        with open(self.path, "a") as file:
            file.write("".join(map(_line, new)))


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"
