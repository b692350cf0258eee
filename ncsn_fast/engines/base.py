"""What an engine is: a fast network call for one model and one micro-batch shape, and the loop
around it."""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.samplers.program import Chains, Program, Update, run

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_name(dtype: str | torch.dtype | None, kind: type[Engine]) -> str:
    """Our name of a type ("fp32", torch.float32, "float32", ...) that an engine class computes in.

    None is the engine's first. ValueError names the types it has.
    """
    aliases = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    given = str(kind.dtypes[0] if dtype is None else dtype).removeprefix("torch.")
    name = aliases.get(given, given)
    if name not in kind.dtypes:
        raise ValueError(
            f"engine {kind.name!r} computes in {' or '.join(kind.dtypes)}; got dtype {dtype!r}"
        )
    return name


class EngineUnavailable(RuntimeError):
    """A named engine that cannot run here; the message says what is missing and which would run."""


class EngineError(RuntimeError):
    """An engine that was built but does not compute what the reference does."""


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Runs with this many CPU threads (None: leave them), and puts the old number back."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Engine(abc.ABC):
    """A model made ready to run on micro-batches of a fixed size.

    Args:
        model: the ScoreModel; it is not changed.
        dtype: type the network computes in.   batch_size: images in a micro-batch.
        threads: CPU threads; None for torch's setting.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("fp32",)

    def __init__(
        self,
        model: ScoreModel,
        *,
        device: torch.device,
        dtype: str,
        batch_size: int,
        threads: int | None = None,
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.batch_size, self.threads = batch_size, threads

    def resized(self, batch_size: int) -> Engine:
        """The same engine for micro-batches of another size, sharing its weights."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    @classmethod
    @abc.abstractmethod
    def unavailable(cls) -> str | None:
        """None if the engine runs on this machine, else what is missing and how to get it."""

    @abc.abstractmethod
    def network(self, x: Tensor, level: Tensor | None) -> Tensor:
        """Raw output f for x (batch_size, C, H, W) float32; level (batch_size,) for conditional
        networks."""

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Settings under which everything of this engine runs."""
        with torch.inference_mode(), torch_threads(self.threads):
            yield

    def run(
        self,
        program: Program,
        chains: Chains,
        *,
        start: int = 0,
        update: Update | None = None,
        on_level: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Runs a program (in terms of sigma * score) on a micro-batch; returns the final state."""
        sigma = torch.from_numpy(program.sigma)
        factor = np.asarray(self.model.score_factor(sigma), dtype=np.float64)
        scaled = program.scaled(program.sigma * factor)
        levels = None
        if self.model.conditional:
            indices = self.model.nearest_level(sigma.to(self.model.device)).to(self.device)
            levels = indices[:, None].expand(-1, len(chains.x))

        def network(x: Tensor, k: int) -> Tensor:
            return self.network(x, None if levels is None else levels[k])

        with self.context():
            return run(scaled, network, chains, start=start, update=update, on_level=on_level)

    def output(self, x: Tensor, level: Tensor | None) -> Tensor:
        """Raw output f for any number of images: micro-batches of batch_size, the last one
        padded."""
        parts = []
        with self.context():
            for i in range(0, len(x), self.batch_size):
                rows = torch.arange(i, i + self.batch_size).clamp(max=len(x) - 1)
                f = self.network(
                    x[rows].to(self.device), None if level is None else level[rows].to(self.device)
                )
                parts.append(f.float().cpu()[: len(x) - i])
        return torch.cat(parts) if parts else torch.empty_like(x)


def check_precision(engine: Engine, *, bound: float, n_sigmas: int = 12, seed: int = 0) -> float:
    """Largest relative error of f against eager float32 over the ladder, on noise-like inputs at
    every scale.

    Raises:
        EngineError: the error exceeds `bound` (or is NaN) at some sigma, or float32 itself gives no
            numbers.
    """
    model = engine.model
    generator = torch.Generator().manual_seed(seed)
    shape = (min(engine.batch_size, 2), *model.image_shape)
    worst = 0.0
    picked = np.unique(np.linspace(0, len(model.sigmas) - 1, n_sigmas).round().astype(int))
    for level in picked:
        sigma = float(model.sigmas[level])
        images = torch.rand(shape, generator=generator)
        smooth = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
        x = smooth + sigma * torch.randn(shape, generator=generator)
        levels = torch.full((len(x),), int(level)) if model.conditional else None
        with torch.inference_mode(), ops.backend("reference"):
            expected = model(
                x.to(model.device), None if levels is None else levels.to(model.device)
            ).cpu()
        if not bool(torch.isfinite(expected).all()):
            raise EngineError(
                f"the model's own output is not finite at sigma {sigma:.4g}: its weights are "
                "damaged; load another checkpoint"
            )
        with engine.context():
            on = [None if t is None else t.to(engine.device) for t in (x, levels)]
            f = engine.network(on[0], on[1]).float().cpu()  # type: ignore[arg-type]
        error = float((f - expected).norm() / expected.norm())
        if not error <= bound:
            raise EngineError(
                f"engine {engine.name!r} in {engine.dtype} differs from float32 by {error:.2e} "
                f"(bound {bound:.0e}) at sigma {sigma:.4g}; use dtype='fp32' or "
                "engine='eager', and please report this"
            )
        worst = max(worst, error)
    return worst
