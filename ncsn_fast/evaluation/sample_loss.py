"""SampleLoss: how far samples of a model are from reference images, without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ncsn_fast.data.images import to_uint8
from ncsn_fast.evaluation.distances import PairDistance, polynomial_mmd
from ncsn_fast.evaluation.features import Extractor
from ncsn_fast.evaluation.metrics import statistics_distance, statistics_of
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream

Loss = Literal["energy", "mmd", "frechet", "kid"]
OF_FEATURES = ("frechet", "kid")
# Noise levels at which images are denoised, in units of the references' mean distance: from where a
# denoiser sees strokes to where it hardly tells two images apart.
LEVELS = (1 / 32, 1 / 16, 1 / 8)


class SampleLoss:
    """Distance of samples to references; lower is better, and about 0 for equal distributions.

    "energy" and "mmd" (evaluation/distances.py) compare the images themselves, what the model's
    denoiser makes of them under noise of several levels, and by how much it changes them there: the
    norm |D(x + sigma z) - x|, relative to its mean for references. The first two see whether all of
    the data is there, in its shares; the last sees images that are none of the data, which a
    denoiser changes more. With an extractor, its features are compared, too, and, if it has logits,
    by how much the largest exceeds the second: a classifier is less sure of images that are between
    its classes. "frechet" and "kid" compare features of an extractor alone.

    Args:
        references: (M, C, H, W).
        denoise: (x, sigma) -> posterior mean, shape of x; for energy and mmd.
        limits: the smallest and largest noise level that `denoise` takes.
        extractor: for frechet and kid; None, or one more view of images, for energy and mmd.
        noise_seed: of the noise that images get before they are denoised; sample i has noise i.
    """

    def __init__(
        self,
        loss: Loss,
        references: Tensor,
        *,
        denoise: Callable[[Tensor, float], Tensor] | None = None,
        limits: tuple[float, float] = (0.0, torch.inf),
        extractor: Extractor | None = None,
        noise_seed: int = 0,
    ) -> None:
        self.loss, self.noise_seed = loss, noise_seed
        self._denoise, self._extractor = denoise, extractor
        if loss in OF_FEATURES:
            if extractor is None:
                raise ValueError(f"loss {loss!r} is of features: name an extractor")
            self._features = self._features_of(references)[0]
            self._statistics = statistics_of(self._features.numpy())
            return
        if loss not in ("energy", "mmd"):
            raise ValueError(f"loss must be energy, mmd, frechet or kid; got {loss!r}")
        self._pixels = PairDistance(references, loss)
        self._views = [PairDistance(view, loss) for view in self._views_of(references)]
        self._levels: dict[float, tuple[PairDistance, PairDistance]] = {}
        inside = {min(max(s * self._pixels.scale, limits[0]), limits[1]) for s in LEVELS}
        for sigma in sorted(inside) if denoise is not None else ():
            images, residual = self._denoised(references, sigma)
            scale = float(residual.mean())
            of_residuals = PairDistance(residual, loss, scale)
            self._levels[sigma] = PairDistance(images, loss), of_residuals

    def __call__(self, samples: Tensor) -> float:
        """Computes the loss of samples (N, C, H, W) in the range of the references."""
        if self.loss == "frechet":
            found = statistics_of(self._features_of(samples)[0].numpy())
            return statistics_distance(found, self._statistics)
        if self.loss == "kid":
            return polynomial_mmd(self._features_of(samples)[0], self._features)
        distances = [self._pixels(samples)]
        for sigma, (of_images, of_residuals) in self._levels.items():
            images, residual = self._denoised(samples, sigma)
            distances += [of_images(images), of_residuals(residual)]
        views = zip(self._views, self._views_of(samples), strict=True)
        distances += [distance(view) for distance, view in views]
        return sum(distances) / len(distances)

    def _denoised(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Returns what the denoiser makes of x with noise sigma, and its distance to x (N, 1).

        The noise is the same in each call.
        """
        assert self._denoise is not None
        shape = tuple(x.shape[1:])
        z = noise.normal(self.noise_seed, torch.arange(len(x)), Stream.MEASUREMENT, 0, shape)
        images = self._denoise(x + sigma * z, sigma)
        return images, (images - x).flatten(1).norm(dim=1, keepdim=True)

    def _views_of(self, images: Tensor) -> list[Tensor]:
        """Returns an extractor's features of images (N, F), and how sure it is of each (N, 1)."""
        if self._extractor is None:
            return []
        features, logits = self._features_of(images)
        if logits is None or logits.shape[1] < 2:
            return [features]
        first, second = logits.topk(2, dim=1).values.unbind(dim=1)
        return [features, (first - second)[:, None]]

    def _features_of(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns features (N, F), and logits (N, K) or None."""
        assert self._extractor is not None
        levels = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
        features, logits = self._extractor(levels)
        return features.double().cpu(), None if logits is None else logits.double().cpu()
