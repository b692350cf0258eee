"""Sampler: a model, an engine, and everything one draws with them."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsn_fast import engines
from ncsn_fast.checkpoints.loading import resolve_model
from ncsn_fast.data.images import Output, as_tensor, check_output, convert
from ncsn_fast.engines.base import (
    Engine,
    EngineError,
    dtype_name,
    largest_batch_size,
    progress_shown,
)
from ncsn_fast.engines.cuda.graphs import empty_cache
from ncsn_fast.engines.torch_settings import torch_threads
from ncsn_fast.evaluation.bits_per_dim import image_log_likelihood
from ncsn_fast.evaluation.likelihood import Likelihood
from ncsn_fast.inference import runner
from ncsn_fast.inference.cost import CostEstimate, estimate_cost
from ncsn_fast.inference.editor import Editor
from ncsn_fast.inference.runner import Callback, Job, Progress, Report, SamplingError
from ncsn_fast.models.score import ScoreModel, each_sigma
from ncsn_fast.ops import noise
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.procedure import Guide, Procedure, check_guide
from ncsn_fast.samplers.program import Program

log = logging.getLogger(__name__)
_KEPT_SIZES = 4  # micro-batch sizes whose engines are kept


class Sampler(Editor):
    """Draws samples from a score model.

    Args:
        model: what `ncsn_fast.load` takes, or a ScoreModel. None: the newest run below ./runs if
            there is one, else the small digits model that ships with the package; a log line says
            which.
        engine: "auto" (our kernels where they run and are precise enough for the model), or a name;
            see `python -m ncsn_fast.doctor`.
        dtype: "fp32", "bf16" (or torch's; "fp16" and "tf32" on GPUs) for the network; None for what
            is fastest here, if it keeps its precision in it. The state is float32 always.
        device: "cpu", "cuda", "cuda:1"; None takes a GPU if there is one.
        batch_size: images in a micro-batch. Samples are bitwise reproducible for a fixed
            batch_size, which every call then runs, padded. None picks equal micro-batches that suit
            n and the image size: 65 images run as 33 and 32 where 64 is the most.
        compile_cache: folder for what engines compile ("trt"); None for one below ~/.cache.
        threads: CPU threads of a call; None for the calling thread's setting in torch.
        options: the engine's own settings, such as graph="step"; see its class.

    Several threads may share a sampler; their calls give what they give alone. A sampler can be
    pickled, to be sent to another process: it takes its weights along and builds its engine again
    at its first call there, in a dtype that suits that machine unless one was named.

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
        **options: Any,
    ) -> None:
        if engine != "auto":
            engines.named(engine)  # says what is missing before a model is read
        self.model = resolve_model(model)
        kind, self.device, reason = engines.pick(engine, device, self.model)
        kind.check_options(options)
        if compile_cache is not None and not kind.caches:
            raise ValueError(
                f"engine {kind.name!r} keeps no compiled engines, so it has no compile_cache"
            )
        if compile_cache is not None:
            options = {**options, "compile_cache": compile_cache}
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1; got {threads}")
        self.engine_class, self.batch_size, self.threads = kind, batch_size, threads
        self._options, self._halved = options, False
        self._automatic = engine == "auto"
        self._dtype = kind.type_of_file(options) if dtype is None else dtype_name(dtype, kind)
        self.dtype = self._dtype or kind.attempts(self.device, None, options, threads)[0]["dtype"]
        self._begin()
        if engine == "auto":
            level = logging.INFO if kind in engines.OWN else logging.WARNING
            text = "engine %s (%s), %s, on %s"
            log.log(level, text, kind.name, reason, self.dtype, self.device)

    def _begin(self) -> None:
        """Sets what belongs to this process: no engine is built, no call was made."""
        self._building = threading.RLock()
        self._engines: OrderedDict[int, Engine] = OrderedDict()  # the last one is in use
        self._last_call = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_building", "_engines", "_last_call"}
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def report(self) -> Report | None:
        """Report of the calling thread's last call; None before its end, and in other threads.

        A `stream` reports when it is exhausted, to the thread that did so.
        """
        return getattr(self._last_call, "report", None)

    def sample(
        self,
        n: int = 1,
        *,
        seed: int = 0,
        start: int = 0,
        method: str = "ald",
        steps: int | None = None,
        init: Any = None,
        guide: Guide | None = None,
        output: Output = "pt",
        progress: bool = True,
        callback: Callback | None = None,
        **options: Any,
    ) -> Any:
        """Draws samples start .. start+n-1 of a seed.

        Sample i is the same whatever n, start and threads are: bit for bit for a fixed batch_size,
        dtype and algorithm, else up to rounding. Engine "cpu" chooses the latter two by itself for
        each machine and number of threads; dtype= and convolutions= fix them.

        Args:
            method: "ald" (as published), or another row of METHODS (samplers/methods.py); `options`
                are the method's own.
            steps: number of noise levels; None for the method's own.
            init: initial state, images (n, C, H, W); None for the method's own.
            guide: a change of the score, with n rows (samplers/guidance.py).
            output: "pt": float32 (n, C, H, W) in [0, 1] on the CPU; "np": uint8 (n, H, W, C);
                "pil": a list.
            callback: called with a Progress after every noise level.
        """
        program = methods.build(method, self.model, steps, options)
        check_guide(guide, n)
        initial = None if init is None else self._images(init, n)
        job = Job(noise.sample_indices(start, n), init=initial, guide=guide)
        return self._draw(program, job, seed, output, progress, callback)

    def stream(
        self,
        samples: Tensor | Sequence[int],
        *,
        seed: int = 0,
        method: str = "ald",
        steps: int | None = None,
        progress: bool = True,
        **options: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (indices, images in [0, 1]) per micro-batch, for sample indices (n,) int64."""
        program = methods.build(method, self.model, steps, options)
        noise.check_uint32("seed", seed)
        indices = torch.as_tensor(samples, dtype=torch.int64)
        if indices.ndim != 1:
            raise ValueError(f"samples must be indices (n,); got shape {tuple(indices.shape)}")
        return self._run(program, Job(indices), seed, progress)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """grad log p_sigma(x), float32 on the CPU; x is (N, C, H, W), sigma a number or (N,)."""
        x = x.detach().to("cpu", torch.float32)
        sigma = each_sigma(sigma, x)
        condition = self.model.condition(sigma.to(self.model.device))
        factor = torch.as_tensor(self.model.score_factor(sigma))
        f = self.engine_for(len(x)).output(x, None if condition is None else condition.cpu())
        return f * factor[:, None, None, None]

    def log_likelihood(
        self, images: Any, *, seed: int = 0, start: int = 0, **options: Any
    ) -> Likelihood:
        """log p(image) and bits per dimension by the probability flow; fields (N, ...) on the CPU.

        Images of 8-bit levels (uint8, PIL) are dequantised, float ones in [0, 1] taken as they are.
        The network is run as it is, in float32, because engines give no gradients, on the sampler's
        device and threads; `options` are those of `bits.image_log_likelihood`: trace, n_probes,
        rtol, atol, sigma_min, sigma_max.
        """
        options = {"batch_size": self.batch_size, "device": self.device, **options}
        with torch_threads(self.threads):
            return image_log_likelihood(self.model, images, seed=seed, start=start, **options)

    def plan(
        self, n: int, *, method: str = "ald", steps: int | None = None, **options: Any
    ) -> CostEstimate:
        """What sample(n) will do: network evaluations, micro-batches, FLOP, estimated seconds."""
        program = methods.build(method, self.model, steps, options)
        return estimate_cost(self.engine_for(n), program, n)

    def _images(self, images: Any, n: int | None = None) -> Tensor:
        x = as_tensor(images, self.model.image_shape)
        if n is not None and len(x) != n:
            raise ValueError(f"expected {n} images; got {len(x)}")
        return x

    def micro_batch(self, n: int) -> int:
        """Images in a micro-batch of a call for n."""
        if self.batch_size is None and self.engine_class.caches:
            return self.engine_for(n).batch_size
        return self._size(n)

    def _size(self, n: int) -> int:
        kind, shape = self.engine_class, self.model.image_shape
        return self.batch_size or kind.default_batch_size(n, shape, self.device, self._options)

    def engine_for(self, n: int) -> Engine:
        """The engine, built and checked, that a call for n images uses.

        The engines of the last few micro-batch sizes are kept; all share their weights.
        """
        with self._building:
            if not self._engines:
                self._build(self._size(n))
            largest = self._engines[max(self._engines)]
            size = largest.fitting(self._size(n))  # of the engine that could be built
            if size not in self._engines:
                self._engines[size] = largest.resized(size)
            self._engines.move_to_end(size)
            if len(self._engines) > _KEPT_SIZES:
                most = max(self._engines)
                del self._engines[next(kept for kept in self._engines if kept != most)]
            return self._engines[size]

    def _build(self, size: int) -> None:
        """Builds the first engine."""
        if self.batch_size is None and self.engine_class.caches:
            # What is built once and kept must not depend on the size of the first call.
            size = largest_batch_size(self.model.image_shape, self.device)
        engine = engines.build(
            self.engine_class,
            self.model,
            self._dtype,
            device=self.device,
            options=self._options,
            automatic=self._automatic,
            batch_size=size,
            threads=self.threads,
        )
        if self.batch_size is not None and engine.batch_size != size:
            raise ValueError(
                f"this engine's micro-batches have {engine.batch_size} images at the nearest; "
                f"got batch_size {size}"
            )
        self._engines[engine.batch_size] = engine
        self.engine_class, self.dtype = type(engine), engine.dtype

    def _draw(
        self,
        program: Program | Procedure,
        job: Job,
        seed: int,
        output: Output,
        progress: bool,
        callback: Callback | None,
    ) -> Any:
        check_output(output)
        noise.check_uint32("seed", seed)
        parts = [x for _, x in self._run(program, job, seed, progress, callback)]
        return convert(
            torch.cat(parts) if parts else torch.empty(0, *self.model.image_shape), output
        )

    def _run(
        self,
        program: Program | Procedure,
        job: Job,
        seed: int,
        progress: bool,
        callback: Callback | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(sample indices, images in [0, 1]) of each micro-batch; leaves a report at the end."""
        self._last_call.report, seconds, began = None, 0.0, time.perf_counter()
        n, nfe = len(job.samples), [torch.zeros(0, dtype=torch.int64)]

        options: dict[str, Any] = {
            "progress": progress,
            "callback": callback,
        }
        shown = progress_shown.set(progress)
        try:
            engine = self.engine_for(n)
        finally:
            progress_shown.reset(shown)

        def shrink(used: Engine, error: Exception) -> Engine:
            nonlocal engine
            engine = self._shrink(used, error)
            return engine

        options["shrink"] = shrink
        for samples, x, evaluations in runner.run(engine, program, job, seed, **options):
            seconds += time.perf_counter() - began
            nfe.append(evaluations)
            yield samples, x.clamp(0, 1)
            began = time.perf_counter()
        report = runner.make_report(engine, program, torch.cat(nfe), seconds)
        self._last_call.report = report

    def _shrink(self, engine: Engine, error: Exception) -> Engine:
        """The engine with half the micro-batch, for a GPU whose memory did not suffice; once."""
        engine.release()
        empty_cache()
        with self._building:
            if self._halved and self.batch_size is not None and self.batch_size < engine.batch_size:
                return self.engine_for(0)  # another thread has halved it meanwhile
            size = engine.batch_size // 2
            if self._halved or size == 0 or engine.fitting(size) != size:
                raise EngineError(
                    f"out of GPU memory with micro-batches of {engine.batch_size}; free memory "
                    "that others hold, or choose a smaller batch_size"
                ) from error
            log.warning(
                "out of GPU memory with micro-batches of %d; going on with %d, so choose "
                "batch_size=%d", engine.batch_size, size, size,
            )  # fmt: skip
            self._halved, self.batch_size = True, size
            self._engines = OrderedDict({size: engine.resized(size)})
            return self._engines[size]


__all__ = ["Progress", "Report", "Sampler", "SamplingError"]
