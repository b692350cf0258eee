"""Editor: what one does with images one has: inpainting, interpolation, denoising."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from ncsn_fast import noise
from ncsn_fast.images import Output, as_mask, convert
from ncsn_fast.jobs import Callback, Job
from ncsn_fast.models.score import ScoreModel, each_sigma
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.editing import (
    InpaintVariant,
    check_draws_noise,
    inpainting,
    interpolation_weights,
)
from ncsn_fast.samplers.plain import Procedure
from ncsn_fast.samplers.program import Program


class Editor(abc.ABC):
    """The part of Sampler that edits; `sampler.py` has the rest."""

    model: ScoreModel

    @abc.abstractmethod
    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """grad log p_sigma(x)."""

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
        variant: InpaintVariant = "ncsnv2",
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
                (samplers/editing.py).
        """
        known = self._images(images)
        keep = as_mask(mask, known)
        program = methods.build(method, self.model, steps, options)
        if isinstance(program, Program):
            program = inpainting(program, variant)
        job = Job(noise.sample_indices(start, len(known)), mask=keep, known=known)
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
        callback: Callback | None = None,
        **options: Any,
    ) -> Any:
        """Rows of frames between two samples.

        Frame k uses the noise cos(t_k) z_p + sin(t_k) z_q, t_k from 0 to pi/2, at every step.

        Returns:
            n_pairs * n_frames images, the frames of a row adjacent. Row r has sample index start +
            r; its first frame is that sample.
        """
        program = methods.build(method, self.model, steps, options)
        check_draws_noise(program)
        weights, rows = interpolation_weights(n_frames), noise.sample_indices(start, n_pairs)
        job = Job(rows.repeat_interleave(n_frames), noise_weights=weights.repeat(n_pairs, 1))
        return self._draw(program, job, seed, output, progress, callback)

    def denoise(self, images: Any, sigma: Tensor | float, *, output: Output = "pt") -> Any:
        """The posterior mean of clean images given images with noise sigma (Tweedie)."""
        x = self._images(images)
        square = each_sigma(sigma, x).square()[:, None, None, None]
        return convert((x + square * self.score(x, sigma)).clamp(0, 1), output)
