"""Restorer: images from what was measured of them: inpainting, colours, enlarging, sharpening."""

from __future__ import annotations

import abc
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ncsn_fast.data.images import (
    Output,
    as_mask,
    as_tensor,
    check_output,
    check_range,
    convert,
)
from ncsn_fast.inference.runner import Callback, Job
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops.noise import sample_indices
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.guidance import Both, Imposed, Projected
from ncsn_fast.samplers.operators import Grey, Mask, Operator, block_mean, gaussian_blur
from ncsn_fast.samplers.procedure import Guide, Procedure, check_guide
from ncsn_fast.samplers.program import Program
from ncsn_fast.samplers.program_transforms import inpainting

Inpainting = Literal["ncsnv2", "ncsn", "projected"]
Restoration = Literal["imposed", "projected"]
FITS, ROUNDS = 1e-6, 200  # |A x - y| that is enough, and the most projections towards it


class Restorer(abc.ABC):
    """The part of Sampler that restores; `inference/editor.py` and `sampler.py` have the rest.

    All methods take what `Sampler.sample` takes: seed, start, method, steps, output, progress,
    callback and the method's own options. Methods with several steps at a level let what is unknown
    settle on what is known: of 96 held-out digits, left halves known, 70 % are completed to their
    own class with ald, 55 % with cas and 59 % with dpmpp.
    """

    model: ScoreModel
    device: torch.device

    @abc.abstractmethod
    def _images(self, images: Any, n: int | None = None) -> Tensor:
        """Images (n, C, H, W) float32 in [0, 1], checked."""

    @abc.abstractmethod
    def _draw(
        self,
        program: Program | Procedure,
        job: Job,
        seed: int,
        output: Output,
        progress: bool,
        callback: Callback | None,
    ) -> Any:
        """Runs a job and returns its images."""

    def inpaint(
        self,
        images: Any,
        mask: Any,
        *,
        variant: Inpainting | None = None,
        seed: int = 0,
        start: int = 0,
        method: str = "ald",
        steps: int | None = None,
        output: Output = "pt",
        progress: bool = True,
        callback: Callback | None = None,
        **options: Any,
    ) -> Any:
        """Fills in unknown pixels; known ones are returned exactly as they were given.

        Args:
            images: (N, C, H, W) in [0, 1] (or uint8, or PIL); unknown pixels may hold anything
                finite.
            mask: True (or non-zero) where a pixel is known; any shape that broadcasts to the
                images.
            variant: "ncsnv2" or "ncsn": the published way of imposing known pixels
                (samplers/program_transforms.py), which pc does after every update; "projected": by
                the score (see `restore`). None: "ncsnv2", or "projected" with a method that imposes
                nothing (ode, adaptive).
        """
        if variant is not None and variant not in get_args(Inpainting):
            raise ValueError(f"variant must be 'projected', 'ncsnv2' or 'ncsn'; got {variant!r}")
        known = self._images(images)
        keep = as_mask(mask, known)
        program = methods.build(method, self.model, steps, options)
        if variant in ("ncsnv2", "ncsn") and not isinstance(program, Program):
            does = "imposes pixels after every update" if _imposes(program) else "imposes nothing"
            raise ValueError(
                f"method {method!r} {does}, so it has no variant {variant!r}; leave it out, or "
                "take 'projected'"
            )
        variant = variant or ("ncsnv2" if _imposes(program) else "projected")
        job = Job(sample_indices(start, len(known)))
        if variant == "projected":
            job.guide = Projected(Mask(keep), known)
        else:
            job.mask, job.known = keep, known
            if isinstance(program, Program):
                program = inpainting(program, variant)
        check_output(output)
        x = self._draw(program, job, seed, "pt", progress, callback)
        return convert(torch.where(keep, known, x), output)

    def restore(
        self,
        measurements: Tensor,
        operator: Operator,
        *,
        noise: float = 0.0,
        how: Restoration | None = None,
        guide: Guide | None = None,
        seed: int = 0,
        start: int = 0,
        method: str = "ald",
        steps: int | None = None,
        output: Output = "pt",
        progress: bool = True,
        callback: Callback | None = None,
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
        """
        y = self._measured(measurements, operator)
        check_guide(guide, len(y))
        program = methods.build(method, self.model, steps, options)
        how = how or ("imposed" if _imposes(program) and noise == 0 else "projected")
        job = Job(sample_indices(start, len(y)), guide=guide)
        if how == "projected":
            projected = Projected(operator, y, noise)
            job.guide = projected if guide is None else Both(guide, projected)
        elif how == "imposed" and not _imposes(program):
            raise ValueError(f"method {method!r} imposes nothing; take how='projected'")
        elif how == "imposed" and noise == 0:
            job.constraint = Imposed(operator, y)
            if isinstance(program, Program):
                program = inpainting(program)
        else:
            raise ValueError(
                f"how must be 'projected' or, without noise, 'imposed'; got {how!r} and "
                f"noise={noise}"
            )
        check_output(output)
        x = self._draw(program, job, seed, "pt", progress, callback)
        return convert(fitted(x, operator, y) if noise == 0 else x, output)

    def colourise(self, images: Any, **options: Any) -> Any:
        """Colours grey images (N, 1, H, W), which stay the means of the three channels.

        Args:
            options: those of `restore`.
        """
        operator = mean_of_colours(self.model)
        height, width = self.model.image_shape[1:]
        grey = as_tensor(images, (1, height, width))
        check_range(grey, options.get("noise", 0.0))
        return self.restore(grey, operator, **options)

    def super_resolve(self, images: Any, factor: int, **options: Any) -> Any:
        """Enlarges images (N, C, H / factor, W / factor), which stay the means of blocks of pixels.

        Args:
            options: those of `restore`.
        """
        channels, height, width = self.model.image_shape
        operator = block_mean(factor, height, width)
        small = as_tensor(images, (channels, height // factor, width // factor))
        check_range(small, options.get("noise", 0.0))
        return self.restore(small, operator, **options)

    def deblur(self, images: Any, blur: float, **options: Any) -> Any:
        """Sharpens images that a Gaussian of standard deviation `blur` pixels has blurred.

        The image is taken to go on beyond its borders as in a mirror (scipy's "reflect"); for other
        kernels and borders use `restore` with `Linear` or `gaussian_blur`.

        Args:
            options: those of `restore`. A strong blur leaves little to measure: give its `noise`.
        """
        operator = gaussian_blur(blur, *self.model.image_shape[1:])
        blurred = self._images(images)
        check_range(blurred, options.get("noise", 0.0))
        return self.restore(blurred, operator, **options)

    def _measured(self, measurements: Tensor, operator: Operator) -> Tensor:
        """Measurements as float32 on the CPU; ValueError unless the operator makes such."""
        y = torch.as_tensor(measurements).detach().to("cpu", torch.float32)
        n, shape = len(y) if y.ndim else 0, self.model.image_shape
        try:
            expected = tuple(operator.apply(torch.zeros(1, *shape).expand(n, -1, -1, -1)).shape)
        except RuntimeError as error:
            raise ValueError(f"the operator does not take {n} images {shape}: {error}") from error
        if tuple(y.shape) != expected:
            raise ValueError(f"measurements must be {expected}; got {tuple(y.shape)}")
        if not bool(torch.isfinite(y).all()):
            raise ValueError("measurements hold NaN or infinite values")
        return y


def fitted(x: Tensor, operator: Operator, y: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1] with A x = y, near to x, each by itself.

    Alternating projections: onto the images that measure y, and onto [0, 1]. Where there is no such
    image it ends between the two.
    """
    for _ in range(ROUNDS):
        off = (operator.apply(x) - y).abs().flatten(1).amax(1) > FITS if len(x) else x.new_zeros(0)
        if not bool(off.any()):
            break
        x = torch.where(off[:, None, None, None], operator.correct(x, y).clamp(0, 1), x)
    return x


def mean_of_colours(model: ScoreModel) -> Grey:
    """Returns what `colourise` measures; ValueError unless the model's images are RGB."""
    channels = model.image_shape[0]
    if channels != 3:
        raise ValueError(
            f"colourise needs a model of RGB images; this one's have {channels} channel"
            f"{'' if channels == 1 else 's'}"
        )
    return Grey()


def _imposes(program: Program | Procedure) -> bool:
    """Whether a sampler can impose what is known on its way."""
    return isinstance(program, Program) or program.constrains
