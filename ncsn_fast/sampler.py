"""Sampler: a model, an engine, and everything one draws with them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
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
    default_batch_size,
    dtype_name,
    progress_shown,
    torch_threads,
)
from ncsn_fast.engines.cuda.graphs import empty_cache
from ncsn_fast.evaluation.bits_per_dim import image_log_likelihood
from ncsn_fast.evaluation.likelihood import Likelihood
from ncsn_fast.inference import editing, runner
from ncsn_fast.inference.cost import CostEstimate, estimate_cost
from ncsn_fast.inference.editing import Inpainting, Restoration
from ncsn_fast.inference.runner import Callback, Job, Progress, Report, SamplingError
from ncsn_fast.inference.sampling_params import CALL_PARAMETERS, SamplingCall, keywords_of, takes
from ncsn_fast.models.score import ScoreModel, each_sigma
from ncsn_fast.ops import noise
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.guidance import Gradient
from ncsn_fast.samplers.operators import Operator
from ncsn_fast.samplers.procedure import Guide, Procedure, check_guide
from ncsn_fast.samplers.program import Program

log = logging.getLogger(__name__)


class Sampler:
    """Draws samples from a score model, and edits images with it.

    All methods that draw take the keyword arguments seed, start, method, steps, output, progress
    and callback, and the options of the method, as `sample` explains them.

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
            batch_size; None picks a power of two that suits n and the image size.
        compile_cache: folder for what engines compile ("trt"); None for one below ~/.cache.
        threads: CPU threads; None for torch's setting.
        options: the engine's own settings, such as graph="step"; see its class.

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
        self._engines: dict[int, Engine] = {}
        self.report: Report | None = None
        if engine == "auto":
            level = logging.INFO if kind in engines.OWN else logging.WARNING
            text = "engine %s (%s), %s, on %s"
            log.log(level, text, kind.name, reason, self.dtype, self.device)

    @takes(
        methods.parameters(),
        explained=f"Options of the methods:\n{methods.describe_options()}",
    )
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
            seed, start: seed of all noise, and index of the first sample.
            method: "ald" (as published), or another row of METHODS (samplers/methods.py).
            steps: number of noise levels; None for the method's own.
            init: initial state, images (n, C, H, W); None for the method's own.
            guide: a change of the score, with n rows (samplers/guidance.py).
            output: "pt": float32 (n, C, H, W) in [0, 1] on the CPU; "np": uint8 (n, H, W, C);
                "pil": a list.
            progress: whether to show a progress bar.
            callback: called with a Progress after every noise level.
            options: the method's own; the end of this text has them.
        """
        call = SamplingCall(
            seed=seed,
            start=start,
            method=method,
            steps=steps,
            output=output,
            progress=progress,
            callback=callback,
            options=options,
        )
        program = call.build(self.model)
        check_guide(guide, n)
        initial = None if init is None else self._initial(init, n)
        return self._draw(call, program, Job(call.samples(n), init=initial, guide=guide))

    @takes(methods.parameters())
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
        call = SamplingCall(
            seed=seed, method=method, steps=steps, progress=progress, options=options
        )
        program = call.build(self.model)
        noise.check_uint32("seed", seed)
        indices = torch.as_tensor(samples, dtype=torch.int64)
        if indices.ndim != 1:
            raise ValueError(f"samples must be indices (n,); got shape {tuple(indices.shape)}")
        return self._run(call, program, Job(indices))

    @takes(CALL_PARAMETERS)
    def inpaint(
        self, images: Any, mask: Any, *, variant: Inpainting | None = None, **options: Any
    ) -> Any:
        """Fills in unknown pixels; known ones are returned exactly as they were given.

        Methods with several steps at a level let what is unknown settle on what is known: of 96
        held-out digits, left halves known, 70 % are completed to their own class with ald, 55 %
        with cas and 59 % with dpmpp.

        Args:
            images: (N, C, H, W) in [0, 1] (or uint8, or PIL); unknown pixels may hold anything
                finite.
            mask: True (or non-zero) where a pixel is known; any shape that broadcasts to the
                images.
            variant: "ncsnv2" or "ncsn": the published way of imposing known pixels
                (samplers/program_transforms.py), which pc does after every update; "projected": by
                the score (see `restore`). None: "ncsnv2", or "projected" with a method that imposes
                nothing (ode, adaptive).
            options: those of `sample`.
        """
        call = SamplingCall.from_keywords(options)
        return self._draw(call, *editing.inpaint(self.model, images, mask, call, variant))

    @takes(CALL_PARAMETERS)
    def restore(
        self,
        measurements: Tensor,
        operator: Operator,
        *,
        noise: float = 0.0,
        how: Restoration | None = None,
        guide: Guide | None = None,
        **options: Any,
    ) -> Any:
        """Draws images x that could have been measured: y = A x + noise z.

        Without noise A x = y holds at the end, as far as images in [0, 1] can have it.

        Args:
            measurements: y (N, ...), one row per image.
            operator: A; samplers/operators.py has some, and makes one of any linear function.
            noise: standard deviation of the noise on the measurements, in their unit. Measurements
                of 8 bits have at least 0.001; say so if A nearly loses what it measures.
            how: "imposed": what is measured is replaced at every step; "projected": the score of
                images that measure y (samplers/guidance.py), with every method, and with noise.
                None: "imposed" where the method can do that and there is no noise.
            guide: a guide beside, such as Conditional (samplers/guidance.py).
            options: those of `sample`.
        """
        call = SamplingCall.from_keywords(options)
        edit = editing.restore(
            self.model, measurements, operator, call, noise=noise, how=how, guide=guide
        )
        return self._draw(call, *edit)

    @takes(keywords_of(restore))
    def colourise(self, images: Any, **options: Any) -> Any:
        """Colours grey images (N, 1, H, W), which stay the means of the three channels.

        Args:
            options: those of `restore`.
        """
        measured = editing.grey_images(self.model, images, options.get("noise", 0.0))
        return self.restore(*measured, **options)

    @takes(keywords_of(restore))
    def super_resolve(self, images: Any, factor: int, **options: Any) -> Any:
        """Enlarges images (N, C, H / factor, W / factor), which stay the means of blocks of pixels.

        Args:
            options: those of `restore`.
        """
        measured = editing.small_images(self.model, images, factor, options.get("noise", 0.0))
        return self.restore(*measured, **options)

    @takes(keywords_of(restore))
    def deblur(self, images: Any, blur: float, **options: Any) -> Any:
        """Sharpens images that a Gaussian of standard deviation `blur` pixels has blurred.

        The image is taken to go on beyond its borders as in a mirror (scipy's "reflect"); for other
        kernels and borders use `restore` with `Linear` or `gaussian_blur`.

        Args:
            options: those of `restore`. A strong blur leaves little to measure: give its `noise`.
        """
        measured = editing.blurred_images(self.model, images, blur, options.get("noise", 0.0))
        return self.restore(*measured, **options)

    @takes(CALL_PARAMETERS)
    def sdedit(
        self,
        images: Any,
        *,
        sigma: float | None = None,
        strength: float | None = None,
        **options: Any,
    ) -> Any:
        """Varies images: adds noise, and samples from there (SDEdit, Meng et al., ICLR 2022).

        More noise keeps less of an image, and makes the result more like the model's data.

        Args:
            images: (N, C, H, W) in [0, 1] (or uint8, or PIL): photos, strokes, collages.
            sigma: noise level to start at, or rather the nearest to it of the model's ladder.
            strength: in its place, how much of the ladder is run, from 0 (none) to 1, in log sigma.
            options: those of `sample`.
        """
        call = SamplingCall.from_keywords(options)
        return self._draw(call, *editing.sdedit(self.model, images, call, sigma, strength))

    @takes(CALL_PARAMETERS)
    def guided(
        self,
        labels: Any,
        classifier: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        gradient: Gradient | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> Any:
        """Draws samples of given classes with a user's classifier of noisy images.

        The score becomes score(x, sigma) + scale * grad_x log p(label | x, sigma).

        Args:
            labels: (N,), the class of each sample.
            classifier: (x (B, C, H, W), sigma (B,)) -> logits (B, K), on the engine's device.
            gradient: in its place, (x, sigma, labels) -> grad_x log p(labels | x, sigma).
            scale: 1 is Bayes' rule; more sharpens, at the cost of variety.
            options: those of `sample`.
        """
        call = SamplingCall.from_keywords(options)
        edit = editing.guided(
            self.model, labels, classifier, call,
            gradient=gradient, scale=scale, device=self.device,
        )  # fmt: skip
        return self._draw(call, *edit)

    @takes(CALL_PARAMETERS)
    def interpolate(self, n_pairs: int = 1, n_frames: int = 8, **options: Any) -> Any:
        """Rows of frames between two samples.

        Frame k uses the noise cos(t_k) z_p + sin(t_k) z_q, t_k from 0 to pi/2, at every step.

        Args:
            options: those of `sample`.

        Returns:
            n_pairs * n_frames images, the frames of a row adjacent. Row r has sample index start +
            r; its first frame is that sample.
        """
        call = SamplingCall.from_keywords(options)
        return self._draw(call, *editing.interpolate(self.model, n_pairs, n_frames, call))

    def denoise(self, images: Any, sigma: Tensor | float, *, output: Output = "pt") -> Any:
        """The posterior mean of clean images given images with noise sigma (Tweedie)."""
        return convert(editing.denoise(self.model, images, sigma, self.score), output)

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

    @takes(methods.parameters())
    def plan(
        self, n: int, *, method: str = "ald", steps: int | None = None, **options: Any
    ) -> CostEstimate:
        """What sample(n) will do: network evaluations, micro-batches, FLOP, estimated seconds."""
        program = SamplingCall(method=method, steps=steps, options=options).build(self.model)
        return estimate_cost(self.engine_for(n), program, n)

    def _initial(self, images: Any, n: int) -> Tensor:
        x = as_tensor(images, self.model.image_shape)
        if len(x) != n:
            raise ValueError(f"expected {n} images; got {len(x)}")
        return x

    def micro_batch(self, n: int) -> int:
        """Images in a micro-batch of a call for n."""
        if self.batch_size is None and self.engine_class.caches:
            return self.engine_for(n).batch_size
        return self.batch_size or default_batch_size(n, self.model.image_shape, self.device)

    def engine_for(self, n: int) -> Engine:
        """The engine, built and checked, that a call for n images uses."""
        size = self.batch_size or default_batch_size(n, self.model.image_shape, self.device)
        if not self._engines:
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
        largest = max(self._engines.values(), key=lambda engine: engine.batch_size)
        size = largest.fitting(size)
        if size not in self._engines:
            self._engines[size] = largest.resized(size)
        return self._engines[size]

    def _draw(
        self,
        call: SamplingCall,
        program: Program | Procedure,
        job: Job,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Images of a job as the call wants them, after `finish` on those in [0, 1]."""
        check_output(call.output)
        noise.check_uint32("seed", call.seed)
        parts = [x for _, x in self._run(call, program, job)]
        x = torch.cat(parts) if parts else torch.empty(0, *self.model.image_shape)
        return convert(x if finish is None else finish(x), call.output)

    def _run(
        self, call: SamplingCall, program: Program | Procedure, job: Job
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(sample indices, images in [0, 1]) of each micro-batch; leaves a report at the end."""
        self.report, seconds, began = None, 0.0, time.perf_counter()
        n, nfe = len(job.samples), [torch.zeros(0, dtype=torch.int64)]
        options: dict[str, Any] = {
            "progress": call.progress,
            "callback": call.callback,
            "shrink": self._shrink,
        }
        shown = progress_shown.set(call.progress)
        try:
            engine = self.engine_for(n)
        finally:
            progress_shown.reset(shown)
        for samples, x, evaluations in runner.run(engine, program, job, call.seed, **options):
            seconds += time.perf_counter() - began
            nfe.append(evaluations)
            yield samples, x.clamp(0, 1)
            began = time.perf_counter()
        self.report = runner.make_report(self.engine_for(n), program, torch.cat(nfe), seconds)

    def _shrink(self, engine: Engine, error: Exception) -> Engine:
        """The engine with half the micro-batch, for a GPU whose memory did not suffice; once."""
        engine.release()
        empty_cache()
        size = engine.batch_size // 2
        if self._halved or size == 0 or engine.fitting(size) != size:
            raise EngineError(
                f"out of GPU memory with micro-batches of {engine.batch_size}; free memory that "
                "others hold, or choose a smaller batch_size"
            ) from error
        log.warning(
            "out of GPU memory with micro-batches of %d; going on with %d, so choose batch_size=%d",
            engine.batch_size, size, size,
        )  # fmt: skip
        self._halved, self.batch_size = True, size
        self._engines = {size: engine.resized(size)}
        return self._engines[size]


__all__ = ["Progress", "Report", "Sampler", "SamplingError"]
