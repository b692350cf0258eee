"""Editor: what else one does with images: guiding, varying, interpolating, denoising."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.data.images import Output, check_range, convert
from ncsn_fast.inference.restorer import Restorer
from ncsn_fast.inference.runner import Callback, Job
from ncsn_fast.models.score import each_sigma
from ncsn_fast.ops.noise import Stream, check_uint32, normal, sample_indices
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.guidance import Conditional, Gradient, check_labels, classifier_gradient
from ncsn_fast.samplers.program_transforms import (
    check_draws_noise,
    interpolation_weights,
    start_level,
)


class Editor(Restorer):
    """The part of Sampler that edits; all methods that draw take what `Sampler.sample` takes."""

    @abc.abstractmethod
    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """grad log p_sigma(x)."""

    def guided(
        self,
        labels: Any,
        classifier: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        gradient: Gradient | None = None,
        scale: float = 1.0,
        seed: int = 0,
        start: int = 0,
        method: str = "ald",
        steps: int | None = None,
        output: Output = "pt",
        progress: bool = True,
        callback: Callback | None = None,
        **options: Any,
    ) -> Any:
        """Draws samples of given classes with a user's classifier of noisy images.

        The score becomes score(x, sigma) + scale * grad_x log p(label | x, sigma).

        Args:
            labels: (N,), the class of each sample.
            classifier: (x (B, C, H, W), sigma (B,)) -> logits (B, K), on the engine's device.
            gradient: in its place, (x, sigma, labels) -> grad_x log p(labels | x, sigma).
            scale: 1 is Bayes' rule; more sharpens, at the cost of variety.
        """
        if (classifier is None) == (gradient is None):
            raise ValueError("give either a classifier or a gradient")
        labels = torch.as_tensor(labels)
        if labels.ndim == 0:
            raise ValueError("labels must be (N,), one per sample; got one number")
        if classifier is not None:
            check_labels(labels, classifier, self.model.image_shape, self.device)
            gradient = classifier_gradient(classifier)
        assert gradient is not None
        program = methods.build(method, self.model, steps, options)
        guide = Conditional(gradient, labels, scale)
        job = Job(sample_indices(start, len(labels)), guide=guide)
        return self._draw(program, job, seed, output, progress, callback)

    def sdedit(
        self,
        images: Any,
        *,
        sigma: float | None = None,
        strength: float | None = None,
        seed: int = 0,
        start: int = 0,
        method: str = "ald",
        steps: int | None = None,
        output: Output = "pt",
        progress: bool = True,
        callback: Callback | None = None,
        **options: Any,
    ) -> Any:
        """Varies images: adds noise, and samples from there (SDEdit, Meng et al., ICLR 2022).

        More noise keeps less of an image, and makes the result more like the model's data.

        Args:
            images: (N, C, H, W) in [0, 1] (or uint8, or PIL): photos, strokes, collages.
            sigma: noise level to start at, or rather the nearest to it of the model's ladder.
            strength: in its place, how much of the ladder is run, from 0 (none) to 1, in log sigma.
        """
        x = self._images(images)
        check_range(x)
        level = start_level(self.model.sigmas.double().numpy(force=True), sigma, strength)
        program = methods.build(method, self.model, steps, {**options, "sigma_start": level})
        samples = sample_indices(start, len(x))
        check_uint32("seed", seed)
        z = normal(seed, samples, Stream.INITIAL, 0, tuple(x.shape[1:]))
        job = Job(samples, init=x + float(program.sigma[0]) * z)
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
        weights, rows = interpolation_weights(n_frames), sample_indices(start, n_pairs)
        job = Job(rows.repeat_interleave(n_frames), noise_weights=weights.repeat(n_pairs, 1))
        return self._draw(program, job, seed, output, progress, callback)

    def denoise(self, images: Any, sigma: Tensor | float, *, output: Output = "pt") -> Any:
        """The posterior mean of clean images given images with noise sigma (Tweedie)."""
        x = self._images(images)
        sigmas = each_sigma(sigma, x)
        check_range(x, float(sigmas.max()) if len(x) else 0.0)
        square = sigmas.square()[:, None, None, None]
        return convert((x + square * self.score(x, sigma)).clamp(0, 1), output)
