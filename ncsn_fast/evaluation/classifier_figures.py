"""Figures of samples by a classifier that ships, beside real images given by the user."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn_fast.data import datasets
from ncsn_fast.data.images import to_uint8
from ncsn_fast.evaluation.features import Extractor
from ncsn_fast.evaluation.metrics import DigitFigures, frechet_distance, nearest_of

COMPARED = 1000  # held-out images whose nearest training images are searched


class RealDigits:
    """Real images of the ten digits, beside which samples are judged.

    Args:
        extractor: a classifier, with logits of the ten classes.
        train: images that a model learnt from.   held_out: labelled images that it did not.

    Raises:
        ValueError: a classifier without logits, or held-out images without labels.
    """

    def __init__(
        self, extractor: Extractor, train: datasets.Images, held_out: datasets.Images
    ) -> None:
        if extractor.classes != 10:
            raise ValueError(
                f"figures need a classifier of ten digits, such as mnist; {extractor.name} has "
                f"{extractor.classes} classes"
            )
        if held_out.labels is None or min(len(train), len(held_out)) < 2:
            raise ValueError(
                f"figures need two images or more for training and two labelled ones held out; "
                f"got {len(train)} and {len(held_out)}"
                f"{'' if held_out.labels is not None else ' without labels'}"
            )
        self.extractor, self.train, self.labels = extractor, train, held_out.labels.numpy()
        self.held_out = datasets.stack(held_out)

    def figures(self, samples: Tensor) -> DigitFigures:
        """Computes the figures of samples (N, 1, S, S) in [0, 1].

        The margin is the largest logit minus the second largest. A classifier may be sure of what
        is no digit, which then shows in the distances. The Fréchet distance falls with
        the number of images, so that of the training images takes as many of them as samples.
        """
        features, logits = self._outputs(torch.from_numpy(to_uint8(samples)).permute(0, 3, 1, 2))
        real_features, real_logits = self._real
        evenly = np.linspace(0, len(self.train) - 1, min(len(samples), len(self.train)))
        some, _ = self._outputs(datasets.stack(self.train, evenly.round().astype(int).tolist()))
        nearest, _ = nearest_of(samples, self.train)
        share = np.bincount(logits.argmax(axis=1), minlength=10) / len(samples)
        threshold = np.percentile(_margin(real_logits), 5)
        return DigitFigures(
            n=len(samples),
            class_share=share.tolist(),
            recognised=float((_margin(logits) > threshold).mean()),
            held_out_accuracy=float((real_logits.argmax(axis=1) == self.labels).mean()),
            frechet=frechet_distance(features, real_features),
            frechet_train=frechet_distance(some, real_features),
            nearest_train=float(nearest.median()),
            nearest_train_held_out=float(self._nearest_real.median()),
            copies=float((nearest < self._nearest_real.quantile(0.01)).double().mean()),
        )

    def _outputs(self, images: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        features, logits = self.extractor(images)
        assert logits is not None
        return features.double().numpy(), logits.double().numpy()

    @functools.cached_property
    def _real(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self._outputs(self.held_out)

    @functools.cached_property
    def _nearest_real(self) -> Tensor:
        return nearest_of(self.held_out[:COMPARED].float() / 255, self.train)[0]


def _margin(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    two = np.sort(logits, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]
