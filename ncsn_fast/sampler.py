"""Sampler: a model, an engine, and everything one draws with them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ncsn_fast import checkpoint, engines, noise
from ncsn_fast.engines.base import DTYPES, Engine
from ncsn_fast.images import as_tensor, to_pil, to_uint8
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.plan import Plan, make_plan
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.editing import InpaintVariant, inpainting, interpolation_weights
from ncsn_fast.samplers.program import Chains, Program, initial_state

log = logging.getLogger(__name__)
Output = Literal["pt", "np", "pil"]


class SamplingError(RuntimeError):
    """Chains that left the finite numbers; the message says which sample and where."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a callback is told after each noise level.

    x is the state of this micro-batch's chains (B, C, H, W), a view that the next level overwrites.
    """

    method: str
    level: int
    n_levels: int
    sigma: float
    nfe: int
    samples: Tensor
    x: Tensor


@dataclasses.dataclass(frozen=True)
class Report:
    """How the last call went: network evaluations per sample, images, seconds, and what ran them."""

    method: str
    nfe: int
    n: int
    seconds: float
    engine: str
    dtype: str
    batch_size: int


@dataclasses.dataclass
class _Job:
    """All chains of a call, before they are cut into micro-batches; first dimension n throughout."""

    samples: Tensor
    noise_weights: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    init: Tensor | None = None

    def rows(self, index: Tensor) -> _Job:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _Job(
            **{name: None if value is None else value[index] for name, value in fields.items()}
        )


class Sampler:
    """Draws samples from a score model.

    Args:
        model: what `ncsn_fast.load` takes, or a ScoreModel. None: the newest run below ./runs if there is one,
            else the small digits model that ships with the package; a log line says which.
        engine: "auto" (the fastest that runs here), or a name; see `python -m ncsn_fast.doctor`.
        dtype: "fp32" or "bf16" (or the torch dtype) for the network; the state is float32 always.
        device: "cpu", "cuda", "cuda:1"; None takes a GPU if there is one.
        batch_size: images in a micro-batch. Samples are bitwise reproducible for a fixed batch_size; None picks
            a power of two that suits n and the image size.
        compile_cache: folder for engines that compile; those of this version do not.
        threads: CPU threads; None for torch's setting.

    Raises:
        EngineUnavailable: the named engine cannot run here; the message says what is missing.
    """

    def __init__(
        self,
        model: str | Path | ScoreModel | None = None,
        *,
        engine: str = "auto",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        compile_cache: str | Path | None = None,
        threads: int | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "device 'cuda' was asked for, but torch sees no NVIDIA GPU; use device='cpu'"
            )
        kind, reason = engines.pick(engine, self.device)
        if compile_cache is not None:
            raise ValueError(f"engine {kind.name!r} compiles nothing, so it has no compile_cache")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1; got {threads}")
        self.engine_class, self.batch_size, self.threads = kind, batch_size, threads
        self.dtype = _dtype_name(dtype, kind)
        self.model = resolve_model(model).eval()
        self._engines: dict[int, Engine] = {}
        self.report: Report | None = None
        log.info("engine %s (%s), %s, on %s", kind.name, reason, self.dtype, self.device)

    def sample(
        self,
        n: int = 1,
        *,
        seed: int = 0,
        start: int = 0,
        method: str = "ald",
        steps: int | None = None,
        init: Any = None,
        output: Output = "pt",
        progress: bool = True,
        callback: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> Any:
        """Draws samples start .. start+n-1 of a seed; sample i is the same whatever n, start and batch size are.

        Args:
            method: "ald" (as published) or "cas"; `options` are the method's own (samplers/methods.py).
            steps: number of noise levels; None for the model's own ladder.
            init: initial state, images (n, C, H, W); None for the method's own.
            output: "pt": float32 (n, C, H, W) in [0, 1] on the CPU; "np": uint8 (n, H, W, C); "pil": a list.
            callback: called with a Progress after every noise level.
        """
        program = methods.build(method, self.model, steps, options)
        job = _Job(_indices(start, n), init=None if init is None else self._images(init, n))
        return self._draw(program, job, seed, output, progress, callback)

    def stream(
        self,
        samples: Tensor,
        *,
        seed: int = 0,
        method: str = "ald",
        steps: int | None = None,
        progress: bool = True,
        **options: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (indices, images in [0, 1]) per micro-batch for any sample indices (n,) int64."""
        program = methods.build(method, self.model, steps, options)
        noise.check_uint32("seed", seed)
        return self._run(program, _Job(samples), seed, progress, None)

    def inpaint(
        self,
        images: Any,
        mask: Any,
        *,
        variant: InpaintVariant = "ncsnv2",
        seed: int = 0,
        start: int = 0,
        method: str = "ald",
        steps: int | None = None,
        output: Output = "pt",
        progress: bool = True,
        callback: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> Any:
        """Fills in unknown pixels; known ones are returned exactly as they were given.

        Args:
            images: (N, C, H, W) in [0, 1] (or uint8, or PIL); unknown pixels may hold anything finite.
            mask: True (or non-zero) where a pixel is known; any shape that broadcasts to the images.
            variant: "ncsnv2" or "ncsn": the published way of imposing known pixels (samplers/editing.py).
        """
        known = self._images(images)
        keep = torch.as_tensor(mask).to("cpu") != 0
        try:
            keep = keep.expand(known.shape).contiguous()
        except RuntimeError as error:
            raise ValueError(
                f"mask must broadcast to the images {tuple(known.shape)}; got {tuple(keep.shape)}"
            ) from error
        program = inpainting(methods.build(method, self.model, steps, options), variant)
        job = _Job(_indices(start, len(known)), mask=keep, known=known)
        return self._draw(program, job, seed, output, progress, callback)

    def interpolate(
        self,
        n_pairs: int = 1,
        n_frames: int = 8,
        *,
        seed: int = 0,
        start: int = 0,
        method: str = "ald",
        steps: int | None = None,
        output: Output = "pt",
        progress: bool = True,
        callback: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> Any:
        """Rows of frames between two samples: frame k uses the noise cos(t_k) z_p + sin(t_k) z_q, t_k in [0, pi/2].

        Returns:
            n_pairs * n_frames images, the frames of a row adjacent. Row r has sample index start + r; its first
            frame is that sample.
        """
        program = methods.build(method, self.model, steps, options)
        job = _Job(
            _indices(start, n_pairs).repeat_interleave(n_frames),
            noise_weights=interpolation_weights(n_frames).repeat(n_pairs, 1),
        )
        return self._draw(program, job, seed, output, progress, callback)

    def score(self, x: Tensor, sigma: float) -> Tensor:
        """grad log p_sigma(x) at one noise level, for x (N, C, H, W); float32 on the CPU."""
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma must be positive and finite; got {sigma}")
        level = (
            self.model.nearest_level(sigma).cpu().expand(len(x)) if self.model.conditional else None
        )
        f = self._engine(len(x)).output(x.to(torch.float32), level)
        return f * self.model.score_factor(float(sigma))

    def denoise(self, images: Any, sigma: float, *, output: Output = "pt") -> Any:
        """The posterior mean of clean images given images with noise sigma: x + sigma^2 score (Tweedie)."""
        x = self._images(images)
        return _convert((x + sigma**2 * self.score(x, sigma)).clamp(0, 1), output)

    def plan(
        self, n: int, *, method: str = "ald", steps: int | None = None, **options: Any
    ) -> Plan:
        """What sample(n) will do: engine, network evaluations, micro-batches, FLOP, estimated seconds."""
        program = methods.build(method, self.model, steps, options)
        return make_plan(self._engine(n), program, n)

    def _images(self, images: Any, n: int | None = None) -> Tensor:
        x = as_tensor(images, self.model.image_shape)
        if n is not None and len(x) != n:
            raise ValueError(f"expected {n} images; got {len(x)}")
        return x

    def _engine(self, n: int) -> Engine:
        size = self.batch_size or default_batch_size(n, self.model.image_shape, self.device)
        if size not in self._engines:
            self._engines[size] = self.engine_class(
                self.model,
                device=self.device,
                dtype=self.dtype,
                batch_size=size,
                threads=self.threads,
            )
        return self._engines[size]

    def _draw(
        self,
        program: Program,
        job: _Job,
        seed: int,
        output: Output,
        progress: bool,
        callback: Callable[[Progress], None] | None,
    ) -> Any:
        noise.check_uint32("seed", seed)
        _check_output(output)
        parts = [images for _, images in self._run(program, job, seed, progress, callback)]
        return _convert(
            torch.cat(parts) if parts else torch.empty(0, *self.model.image_shape), output
        )

    def _run(
        self,
        program: Program,
        job: _Job,
        seed: int,
        progress: bool,
        callback: Callable[[Progress], None] | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(job.samples)
        engine = self._engine(n)
        size, n_levels = engine.batch_size, len(list(program.level_rows()))
        began = time.perf_counter()
        n_batches = -(-n // size)
        with tqdm(
            total=n_batches * n_levels, unit="level", disable=not progress, dynamic_ncols=True
        ) as bar:
            for i in range(0, n, size):
                # The last micro-batch is padded, not shrunk: results do not depend on how the work was split.
                part = job.rows(torch.arange(i, i + size).clamp(max=n - 1))
                count = min(size, n - i)
                x = self._run_batch(engine, program, part, seed, count, bar, callback)
                yield job.samples[i : i + count], x[:count].to("cpu").clamp(0, 1)
        seconds = time.perf_counter() - began
        self.report = Report(program.name, program.nfe, n, seconds, engine.name, engine.dtype, size)

    def _run_batch(
        self,
        engine: Engine,
        program: Program,
        part: _Job,
        seed: int,
        count: int,
        bar: Any,
        callback: Callable[[Progress], None] | None,
    ) -> Tensor:
        device = engine.device
        on = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name != "init"}
        placed = {name: None if value is None else value.to(device) for name, value in on.items()}
        with engine.context():
            x = part.init.to(device).clone() if part.init is not None else None
            if x is None:
                x = initial_state(program, seed, placed["samples"], self.model.image_shape)
        chains = Chains(x=x.contiguous(), seed=seed, **placed)
        n_levels = int(program.level[-1]) + 1 if program.nfe else 0

        def on_level(done: int) -> None:
            level = int(program.level[done - 1])
            bar.update()
            bar.set_postfix(sigma=f"{program.sigma[done - 1]:.3g}", refresh=False)
            _check_finite(chains, seed, level, program.sigma[done - 1])
            if callback is not None:
                sigma = float(program.sigma[done - 1])
                indices = part.samples[:count]
                callback(
                    Progress(program.name, level, n_levels, sigma, done, indices, chains.x[:count])
                )

        return engine.run(program, chains, on_level=on_level)


def _check_finite(chains: Chains, seed: int, level: int, sigma: float) -> None:
    finite = torch.isfinite(chains.x).flatten(1).all(dim=1)
    if not bool(finite.all()):
        index = int(chains.samples[~finite][0])
        raise SamplingError(
            f"sample {index} of seed {seed} is no longer finite at level {level} (sigma {sigma:.4g}); "
            "the step size is too large for this model, or its weights are damaged"
        )


def _indices(start: int, n: int) -> Tensor:
    if n < 0:
        raise ValueError(f"n must be at least 0; got {n}")
    return noise.sample_indices(start, n)


def _check_output(output: str) -> None:
    if output not in ("pt", "np", "pil"):
        raise ValueError(f"output must be 'pt', 'np' or 'pil'; got {output!r}")


def _convert(images: Tensor, output: Output) -> Any:
    _check_output(output)
    if output == "np":
        return to_uint8(images)
    return to_pil(images) if output == "pil" else images


def _dtype_name(dtype: str | torch.dtype | None, kind: type[Engine]) -> str:
    aliases = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    name = (
        {value: key for key, value in DTYPES.items()}.get(dtype, dtype)
        if isinstance(dtype, torch.dtype)
        else dtype
    )
    name = (
        aliases.get(str(name).removeprefix("torch."), str(name))
        if name is not None
        else kind.dtypes[0]
    )
    if name not in kind.dtypes:
        raise ValueError(
            f"engine {kind.name!r} computes in {' or '.join(kind.dtypes)}; got dtype {dtype!r}"
        )
    return name


def default_batch_size(n: int, shape: tuple[int, int, int], device: torch.device) -> int:
    """The smallest power of two that holds n images, at most what keeps activations of a micro-batch moderate."""
    pixels = 65_536 if device.type == "cpu" else 524_288
    most = max(1, min(256, pixels // (shape[1] * shape[2])))
    most = 1 << (most.bit_length() - 1)
    return min(most, 1 << max(0, n - 1).bit_length())


def resolve_model(model: str | Path | ScoreModel | None) -> ScoreModel:
    """The model of Sampler(model=...); None means the newest run below ./runs, else the shipped model."""
    if model is not None:
        return checkpoint.load(model)
    run = checkpoint.newest_run(Path("runs"))
    if run is not None:
        log.info("model: the newest run, %s", run)
        return checkpoint.load(run)
    log.info("model: the shipped digits model (no run below ./runs)")
    return checkpoint.load(checkpoint.SHIPPED)
