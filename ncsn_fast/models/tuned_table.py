"""TunedTable: the table of a few-step sampler that was fitted to a model, and its JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn_fast.data.json_file import plain
from ncsn_fast.diffusion.spacing import check_ladder

VERSION = 2  # 1 had no final
MOST_ROWS, MOST_ETA, MOST_HISTORY, MOST_NOISE = 1000, 100.0, 10.0, 10.0
SMALLEST_SIGMA, LARGEST_SIGMA = 1e-9, 1e9
NOISE_ERROR = 0.1  # relative, of the noise that the state may have, against that of its row
MOST_MEAN = 3 * 64 * 64  # numbers of a mean image: a table is a small file


@dataclasses.dataclass(frozen=True)
class TunedTable:
    """Rows of DPM-Solver++(2M), fitted to a model, that `method="fast"` runs (few_step.py).

    Attributes:
        sigmas: (K,) noise levels, descending; after the last comes the step to 0.
        eta, history: (K - 1,) amount of noise, and weight of the extrapolation, of each step
            between two levels.
        s_noise: scale of all noise.
        final: weight of the extrapolation in the step to 0.
        mean: mean of the chains' start N(mean, sigmas[0]^2), a flat image; None for 0.
        shape: (C, H, W) of the images that it was fitted on.
        facts: how it was fitted and what it gained, for JSON; nothing depends on them.

    Raises:
        ValueError: numbers that are no sampler's: of another length, not finite, out of range, or
            whose noise is not that of the levels.
    """

    sigmas: tuple[float, ...]
    eta: tuple[float, ...]
    history: tuple[float, ...]
    s_noise: float
    shape: tuple[int, int, int]
    final: float = 0.0
    mean: tuple[float, ...] | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        rows = len(self.sigmas)
        if not 2 <= rows <= MOST_ROWS:
            raise ValueError(f"a tuned table has 2 to {MOST_ROWS} rows; got {rows}")
        check_ladder(np.asarray(self.sigmas))
        if not SMALLEST_SIGMA <= self.sigmas[-1] < self.sigmas[0] <= LARGEST_SIGMA:
            raise ValueError(
                f"levels must be in [{SMALLEST_SIGMA:g}, {LARGEST_SIGMA:g}]; got "
                f"{self.sigmas[0]:g} to {self.sigmas[-1]:g}"
            )
        for name, low, high in (("eta", 0.0, MOST_ETA), ("history", -MOST_HISTORY, MOST_HISTORY)):
            values = getattr(self, name)
            if len(values) != rows - 1:
                raise ValueError(
                    f"{name} must have {rows - 1} numbers, one for each step between {rows} "
                    f"levels; got {len(values)}"
                )
            if not all(low <= value <= high for value in values):  # NaN is in no range
                raise ValueError(f"{name} must be in [{low:g}, {high:g}]; got {list(values)}")
        if not 0 < self.s_noise <= MOST_NOISE:
            raise ValueError(f"s_noise must be in (0, {MOST_NOISE:g}]; got {self.s_noise}")
        if not abs(self.final) <= MOST_HISTORY:
            raise ValueError(
                f"final must be in [{-MOST_HISTORY:g}, {MOST_HISTORY:g}]; got {self.final}"
            )
        self._check_mean()
        self._check_noise()

    def _check_mean(self) -> None:
        if self.mean is None:
            return
        if not len(self.mean) == math.prod(self.shape) <= MOST_MEAN:
            raise ValueError(
                f"the mean must be an image {self.shape}, of at most {MOST_MEAN} numbers; got "
                f"{len(self.mean)}"
            )
        if not all(map(math.isfinite, self.mean)):
            raise ValueError("the mean holds NaN or infinite values")

    def _check_noise(self) -> None:
        """Raises ValueError unless the state has, at each row, about the noise of its level."""
        for sigma, noise in zip(self.sigmas, self.noise_levels(), strict=True):
            if not abs(noise / sigma - 1) <= NOISE_ERROR:
                raise ValueError(
                    f"the state has noise {noise:.4g} at level {sigma:.4g}, more than "
                    f"{NOISE_ERROR:.0%} off; s_noise {self.s_noise:g} is too far from 1"
                )

    def noise_levels(self) -> NDArray[np.float64]:
        """Returns the standard deviation of the noise in the state before each row, (K,).

        It is exact for data of one point, which every denoiser output equals.
        """
        sigma, variance = np.asarray(self.sigmas), self.sigmas[0] ** 2
        found = [variance]
        for ratio, after, eta in zip(sigma[1:] / sigma[:-1], sigma[1:], self.eta, strict=True):
            kept = ratio ** (2 * eta)
            variance = ratio**2 * kept * variance + (self.s_noise * after) ** 2 * (1 - kept)
            found.append(variance)
        return np.sqrt(found)

    @property
    def steps(self) -> int:
        """Rows, and so network evaluations per sample."""
        return len(self.sigmas)

    def mean_image(self) -> NDArray[np.float64] | None:
        """Returns the mean of the start, (C, H, W)."""
        return None if self.mean is None else np.reshape(self.mean, self.shape)

    def check_fits(self, shape: tuple[int, ...], ladder: NDArray[np.float64]) -> None:
        """Raises ValueError unless the table is of a model with these images and noise levels."""
        if tuple(shape) != self.shape:
            raise ValueError(f"it was fitted on images {self.shape}; the model's are {shape}")
        first, last = self.sigmas[0], self.sigmas[-1]
        if not math.isclose(first, ladder[0], rel_tol=1e-3) or last < ladder[-1] * (1 - 1e-3):
            raise ValueError(
                f"its levels go from {first:g} to {last:g}; the model's from {ladder[0]:g} to "
                f"{ladder[-1]:g}"
            )

    def digest(self) -> str:
        """Returns the SHA-256 of the numbers: equal tables draw equal samples."""
        numbers = {k: v for k, v in self.to_dict().items() if k != "facts"}
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Returns values for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"version": VERSION, "method": "fast", **plain({**lists, "facts": dict(self.facts)})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TunedTable:
        """Returns the table that `to_dict` gave; ValueError if it is none."""
        given = dict(values)
        version, method = given.pop("version", None), given.pop("method", None)
        if type(version) is not int or version < 1 or method != "fast":
            raise ValueError(
                f"expected a table of method fast; got version {version!r:.40} of {method!r:.40}"
            )
        if version > VERSION:
            raise ValueError(f"it has version {version}, and this package reads {VERSION}: update")
        if version == 1:
            given.setdefault("final", 0.0)
        names = {f.name for f in dataclasses.fields(cls)}
        if wrong := sorted(names ^ given.keys()):
            raise ValueError(f"missing or unknown fields: {wrong!r:.200}")
        shape, facts = given["shape"], given["facts"]
        if not (isinstance(shape, list) and [type(n) for n in shape] == [int] * 3):
            raise ValueError(f"shape must be three integers; got {shape!r:.80}")
        if not isinstance(facts, dict):
            raise ValueError(f"facts must be an object; got {type(facts).__name__}")
        columns = {name: _numbers(name, given[name]) for name in ("sigmas", "eta", "history")}
        mean = None if given["mean"] is None else _numbers("mean", given["mean"])
        (s_noise,), (final,) = (_numbers(name, [given[name]]) for name in ("s_noise", "final"))
        return cls(
            **columns, s_noise=s_noise, shape=tuple(shape), final=final, mean=mean, facts=facts
        )


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
        raise ValueError(f"{name} must be numbers; got {values!r:.80}")
    return tuple(map(float, values))
