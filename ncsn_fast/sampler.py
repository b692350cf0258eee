"""Sampler: draws samples and edits images with a model and an engine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsn_fast import engines
from ncsn_fast.checkpoints.diffusers_pipeline import Pipeline
from ncsn_fast.checkpoints.loading import resolve_model
from ncsn_fast.data.images import Output, convert
from ncsn_fast.engines.base import Engine, dtype_name, progress_shown
from ncsn_fast.engines.torch_settings import torch_threads
from ncsn_fast.evaluation.bits_per_dim import image_log_likelihood
from ncsn_fast.evaluation.likelihood import Likelihood
from ncsn_fast.inference import editing, runner
from ncsn_fast.inference.cost import CostEstimate, estimate_cost
from ncsn_fast.inference.editing import Inpainting, Restoration
from ncsn_fast.inference.engine_pool import EnginePool
from ncsn_fast.inference.runner import Callback, Job, Progress, Report, SamplingError
from ncsn_fast.inference.sampling_params import (
    CALL_PARAMETERS,
    SamplingCall,
    check_form,
    keywords_of,
    takes,
)
from ncsn_fast.models.classes import require_labels
from ncsn_fast.models.inputs import check_floating, check_states, each_sigma
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops import noise
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.guidance import Gradient
from ncsn_fast.samplers.operators import Operator
from ncsn_fast.samplers.procedure import Guide, Procedure, check_guide
from ncsn_fast.samplers.program import Program

log = logging.getLogger(__name__)


class Sampler:
    """Draws samples from a score model, and edits images with it.

    All methods that draw samples accept the keyword arguments seed, start, method, steps, output,
    progress and callback, and the options of the sampling method; `sample` explains them.

    Args:
        model: a ScoreModel, or any source that `ncsn_fast.load` accepts. None: the newest run below
            ./runs, else the small digits model that ships with the package; a log line says which.
        engine: "auto" (our kernels where they run and are precise enough for the model), or a name;
            see `python -m ncsn_fast.doctor`.
        dtype: type the network computes in: "fp32", "bf16", on GPUs also "fp16" and "tf32", or
            torch's. None: the fastest type in which the network keeps its precision. The state is
            always float32.
        device: "cpu", "cuda", "cuda:1"; None takes a GPU if there is one.
        batch_size: images in a micro-batch. Samples are bitwise reproducible for a fixed
            batch_size, which every call then runs, padded. None: equal micro-batches that suit n
            and the image size; 65 images run as 33 and 32 where 64 is the most.
        compile_cache: folder for compiled engines ("trt"); None for a folder below ~/.cache.
        threads: CPU threads of a call; None for the calling thread's setting in torch.
        options: the engine's own options, such as graph="step"; see its class.

    Several threads may share a sampler; their calls give what they give alone. A sampler can be
    pickled, to be sent to another process: it takes its weights along and builds its engine again
    at its first call there, in a dtype that suits that machine unless one was named.

    Raises:
        EngineUnavailable: the named engine cannot run here; the message says what is missing.
    """

    def __init__(
        self,
        model: str | Path | ScoreModel | Pipeline | None = None,
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
            engines.named(engine)  # raises EngineUnavailable before a model is read
        self.model = resolve_model(model)
        kind, self.device, reason = engines.pick(engine, device, self.model)
        kind.check_options(options)
        if compile_cache is not None and not kind.caches:
            raise ValueError(
                f"engine {kind.name!r} keeps no compiled engines, so it has no compile_cache"
            )
        if compile_cache is not None:
            options = {**options, "compile_cache": compile_cache}
        if batch_size is not None:
            batch_size = noise.check_integer("batch_size", batch_size, least=1)
        if threads is not None:
            threads = noise.check_integer("threads", threads, least=1)
        self.threads, self._last_call = threads, threading.local()
        self._pool = EnginePool(
            self.model,
            kind,
            device=self.device,
            dtype=kind.type_of_file(options) if dtype is None else dtype_name(dtype, kind),
            batch_size=batch_size,
            threads=threads,
            options=options,
            automatic=engine == "auto",
        )
        if engine == "auto":
            level = logging.INFO if kind in engines.OWN else logging.WARNING
            text = "engine %s (%s), %s, on %s"
            log.log(level, text, kind.name, reason, self.dtype, self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_last_call"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last_call=threading.local())

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.model.image_shape))
        size = "" if self.batch_size is None else f", batch_size={self.batch_size}"
        runs = f"engine {self.engine_class.name}, {self.dtype}, on {self.device}{size}"
        return f"<Sampler of {self.model.config.arch}, images {shape}: {runs}>"

    @property
    def engine_class(self) -> type[Engine]:
        """Class of the engine; known for certain once it is built."""
        return self._pool.kind

    @property
    def dtype(self) -> str:
        """Type the network computes in; known for certain once the engine is built."""
        return self._pool.dtype

    @property
    def batch_size(self) -> int | None:
        """Images in a micro-batch; None where every call has its own."""
        return self._pool.batch_size

    @batch_size.setter
    def batch_size(self, size: int | None) -> None:
        self._pool.batch_size = size

    @property
    def report(self) -> Report | None:
        """Report of the calling thread's last call; None before its end, and in other threads.

        A `stream` reports when it is exhausted, to the thread that did so.
        """
        return getattr(self._last_call, "report", None)

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
        method: methods.Choice = "ald",
        steps: int | None = None,
        published: str | None = None,
        init: Any = None,
        guide: Guide | None = None,
        output: Output = "pt",
        progress: bool = True,
        callback: Callback | None = None,
        labels: Any = None,
        guidance: float | None = None,
        **options: Any,
    ) -> Any:
        """Draws samples start .. start+n-1 of a seed.

        Sample i does not depend on n, start or threads: it is the same bit for bit for a fixed
        batch_size, dtype and algorithm, else up to rounding. Engine "cpu" chooses the latter two by
        itself for each machine and number of threads; dtype= and convolutions= fix them.

        Args:
            seed, start: seed of all noise, and index of the first sample.
            method: "ald" (as published), another row of METHODS (samplers/methods.py), or a
                function of k-diffusion's form, (model, x, sigmas, ...) -> x.
            steps: noise levels (em: steps in time), not evaluations: ald takes n_steps_each at
                every level. None: the method's own.
            published: name of a published sampler (samplers/published_samplers.py), such as
                "edm-cifar10": its method, steps and options, changed by those that are given.
            init: initial state, images (n, C, H, W); None for the method's own.
            guide: changes the score; has n rows (samplers/guidance.py).
            output: "pt": float32 (n, C, H, W) in [0, 1] on the CPU; "np": uint8 (n, H, W, C);
                "pil": a list.
            progress: whether to show a progress bar.
            callback: called with a Progress after every noise level.
            labels: classes of a model that has them: an integer for all, or one each; or None.
            guidance: weight w of classifier-free guidance, which replaces the network's output by
                F(no class) + w (F(class) - F(no class)); None for F(class). Each step costs twice.
            options: options of the method, listed below.
        """
        call = SamplingCall(
            seed=seed, start=start, method=method, steps=steps, published=published, output=output,
            progress=progress, callback=callback, labels=labels, guidance=guidance, options=options,
        )  # fmt: skip
        program = call.build(self.model)
        check_guide(guide, n)
        initial = None if init is None else editing.initial_states(self.model, init, n)
        return self._draw(call, program, Job(call.samples(n), init=initial, guide=guide))

    @takes(methods.parameters())
    def stream(
        self, samples: Tensor | Sequence[int], *, seed: int = 0, method: methods.Choice = "ald",
        steps: int | None = None, published: str | None = None, progress: bool = True,
        labels: Any = None, guidance: float | None = None, **options: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """Yields (indices, images in [0, 1]) per micro-batch, for sample indices (n,) int64."""
        call = SamplingCall(
            seed=seed, method=method, steps=steps, published=published, progress=progress,
            labels=labels, guidance=guidance, options=options,
        )  # fmt: skip
        program = call.build(self.model)
        noise.check_uint32("seed", seed)
        return self._run(call, program, Job(noise.as_indices(samples)))

    @takes(CALL_PARAMETERS)
    def inpaint(
        self, images: Any, mask: Any, *, variant: Inpainting | None = None, **options: Any
    ) -> Any:
        """Fills in unknown pixels; known pixels are returned exactly as given.

        Methods with several steps at a level fit the unknown pixels to the known ones best: of 96
        held-out digits with known left halves, 70 % are completed to their own class with ald, 55 %
        with cas and 59 % with dpmpp.

        Args:
            images: (N, C, H, W) in [0, 1] (or uint8, or PIL); unknown pixels may hold anything
                finite.
            mask: True (or non-zero) where a pixel is known; any shape that broadcasts to the
                images.
            variant: "ncsnv2" or "ncsn": known pixels are imposed as published in 2020 or 2019
                (samplers/program_transforms.py; by pc after every update). "projected": the score
                is projected (see `restore`). None: "ncsnv2", or "projected" for methods that cannot
                impose pixels (ode, adaptive).
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
        """Draws images x from measurements y = A x + noise z of them.

        Without noise the results fulfil A x = y, as far as images in [0, 1] can.

        Args:
            measurements: y (N, ...), one row per image.
            operator: A; see samplers/operators.py, where `Linear` wraps any linear function.
            noise: standard deviation of the noise on the measurements, in their unit. 8-bit images
                have at least 0.001; give it if A is ill-conditioned.
            how: "imposed": the measurements are imposed at every step. "projected": the score is
                projected on images that measure y (samplers/guidance.py); for every method, and
                with noise. None: "imposed" if the method can and there is no noise.
            guide: a further change of the score, such as Conditional (samplers/guidance.py).
            options: those of `sample`.
        """
        call = SamplingCall.from_keywords(options)
        edit = editing.restore(
            self.model, measurements, operator, call, noise=noise, how=how, guide=guide
        )
        return self._draw(call, *edit)

    @takes(keywords_of(restore))
    def colourise(self, images: Any, **options: Any) -> Any:
        """Colours grey images (N, 1, H, W), the means of the three channels of the result.

        Args:
            options: those of `restore`.
        """
        measured = editing.grey_images(self.model, images, options.get("noise", 0.0))
        return self.restore(*measured, **options)

    @takes(keywords_of(restore))
    def super_resolve(self, images: Any, factor: int, **options: Any) -> Any:
        """Enlarges images (N, C, H / factor, W / factor), means of blocks of the result's pixels.

        Args:
            options: those of `restore`.
        """
        measured = editing.small_images(self.model, images, factor, options.get("noise", 0.0))
        return self.restore(*measured, **options)

    @takes(keywords_of(restore))
    def deblur(self, images: Any, blur: float, **options: Any) -> Any:
        """Sharpens images that were blurred by a Gaussian of standard deviation `blur` pixels.

        Images are mirrored at their borders (scipy's "reflect"). For other kernels and borders use
        `restore` with `Linear` or `gaussian_blur`.

        Args:
            options: those of `restore`. A strong blur is ill-conditioned: give its `noise`.
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
        """Varies images: adds noise and samples from there (SDEdit, Meng et al., ICLR 2022).

        More noise keeps less of an image and makes the result more like the model's data.

        Args:
            images: (N, C, H, W) in [0, 1] (or uint8, or PIL): photos, strokes, collages.
            sigma: noise level to start at; the nearest level of the model's ladder is taken.
            strength: instead of sigma, the share of the ladder that is run, from 0 (none) to 1, in
                log sigma.
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
        """Draws samples of given classes, guided by a classifier of noisy images.

        The score becomes score(x, sigma) + scale * grad_x log p(label | x, sigma).

        Args:
            labels: (N,), the class of each sample.
            classifier: (x (B, C, H, W), sigma (B,)) -> logits (B, K), on the engine's device.
            gradient: instead of classifier, (x, sigma, labels) -> grad_x log p(labels | x, sigma).
            scale: weight of the gradient. 1 is Bayes' rule; more sharpens and reduces variety.
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
        """Draws rows of frames between two samples.

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
        """Returns the posterior mean of clean images given images with noise sigma (Tweedie)."""
        return convert(editing.denoise(self.model, images, sigma, self.score), output)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Returns grad log p_sigma(x), float32 on the CPU, shape of x.

        Args:
            x: (N, C, H, W), or samples in the shape of a wrapped network.
            sigma: a number or (N,).
        """
        require_labels(self.model.config, None)
        check_floating(x)
        x = x.detach().to("cpu", torch.float32)
        check_states(self.model, state := editing.as_states(self.model, x))
        sigma, engine = each_sigma(sigma, x), self.engine_for(len(x))
        seen = engine.condition(sigma.to(self.model.device))
        seen = None if seen is None else seen.cpu()
        score = self.model.score_by(
            lambda u, _: engine.output(u, seen), state, sigma, engine.parameterisation
        )
        return score.reshape(x.shape)

    def log_likelihood(
        self, images: Any, *, seed: int = 0, start: int = 0, **options: Any
    ) -> Likelihood:
        """Computes log p(image) and bits per dimension by the probability flow, (N,) on the CPU.

        8-bit images (uint8, PIL) are dequantised, float images in [0, 1] are taken as they are. As
        engines give no gradients, the network itself is run, in float32, on the sampler's device
        and threads.

        Args:
            options: those of `evaluation.bits_per_dim.image_log_likelihood`: trace, n_probes, rtol,
                atol, sigma_min, sigma_max.
        """
        options = {"batch_size": self.batch_size, "device": self.device, **options}
        with torch_threads(self.threads):
            return image_log_likelihood(self.model, images, seed=seed, start=start, **options)

    @takes(methods.parameters())
    def plan(
        self, n: int, *, method: methods.Choice = "ald", steps: int | None = None,
        published: str | None = None, guidance: float | None = None, **options: Any,
    ) -> CostEstimate:  # fmt: skip
        """Estimates the cost of sample(n): network evaluations, micro-batches, FLOP, seconds."""
        n = noise.check_integer("n", n, least=0)
        call = SamplingCall(method=method, steps=steps, published=published, options=options)
        program = call.build(self.model)
        return estimate_cost(self.engine_for(n), program, n, guidance=guidance is not None)

    def micro_batch(self, n: int) -> int:
        """Returns the number of images in a micro-batch of a call for n."""
        return self._pool.micro_batch(n)

    def engine_for(self, n: int) -> Engine:
        """Returns the engine for a call for n images; builds and checks it if it is new.

        The engines of the last few micro-batch sizes are kept; all share their weights.
        """
        return self._pool.engine_for(n)

    def _draw(
        self,
        call: SamplingCall,
        program: Program | Procedure,
        job: Job,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Runs a job and returns its images, after `finish`, in the output form of the call."""
        check_form(self.model, call.output)
        noise.check_uint32("seed", call.seed)
        parts = [x for _, x in self._run(call, program, job)]
        x = torch.cat(parts) if parts else torch.empty(0, *self.model.image_shape)
        x = x if finish is None else finish(x)
        return convert(x.reshape(len(x), *self.model.sample_shape), call.output)

    def _run(
        self, call: SamplingCall, program: Program | Procedure, job: Job
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (sample indices, images in [0, 1]) of each micro-batch; then sets the report."""
        self._last_call.report, seconds, began = None, 0.0, time.perf_counter()
        n, nfe = len(job.samples), [torch.zeros(0, dtype=torch.int64)]
        job.labels, job.guidance = call.classes(self.model, n), call.guidance

        options: dict[str, Any] = {"progress": call.progress, "callback": call.callback}
        shown = progress_shown.set(call.progress)
        try:
            engine = self.engine_for(n)
        finally:
            progress_shown.reset(shown)

        def shrink(used: Engine, error: Exception) -> Engine:
            nonlocal engine
            engine = self._pool.shrink(used, error)
            return engine

        options["shrink"] = shrink
        for samples, x, evaluations in runner.run(engine, program, job, call.seed, **options):
            seconds += time.perf_counter() - began
            nfe.append(evaluations)
            yield samples, x.clamp(0, 1) if self.model.bounded else x
            began = time.perf_counter()
        report = runner.make_report(engine, program, torch.cat(nfe), seconds)
        self._last_call.report = report


__all__ = ["Progress", "Report", "Sampler", "SamplingError"]
