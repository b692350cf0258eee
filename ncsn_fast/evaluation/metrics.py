"""Metrics of samples: Fréchet distance, nearest neighbours, classifier statistics."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ncsn_fast.data import datasets

Matrix = NDArray[np.float64]
ROWS, ELEMENTS = 1024, 1 << 23  # of a block in which distances are computed


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, for a Fréchet distance.

    Attributes:
        mu, sigma: mean (F,) and covariance (F, F) of its features.   n: images; 0 if unknown.
    """

    mu: Matrix
    sigma: Matrix
    n: int = 0


def statistics_of(features: Matrix) -> Statistics:
    """Returns mean and unbiased covariance of features (N, F), in float64."""
    features = features.astype(np.float64)
    sigma = np.atleast_2d(np.cov(features, rowvar=False))
    return Statistics(features.mean(axis=0), sigma, len(features))


def frechet_distance(a: Matrix, b: Matrix) -> float:
    """Computes the Fréchet distance of Gaussians fitted to two feature sets (N, F), in float64."""
    if min(len(a), len(b)) < 2:
        raise ValueError(
            f"a Fréchet distance needs two samples on each side; got {len(a)} and {len(b)}"
        )
    return statistics_distance(statistics_of(a), statistics_of(b))


def statistics_distance(a: Statistics, b: Statistics) -> float:
    """Computes the Fréchet distance of two Gaussians: non-negative, symmetric up to rounding.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))   (Dowson & Landau 1982; Heusel et al. 2017)

    The last trace is the sum of the singular values of S_a^(1/2) S_b^(1/2), which is accurate for
    singular covariances, too: it takes no root of an eigenvalue of a product.
    """
    try:
        cross = np.linalg.svd(_root(a.sigma) @ _root(b.sigma), compute_uv=False).sum()
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"no Fréchet distance: {error} of a covariance; are the features finite?"
        ) from error
    gap = a.mu - b.mu
    return max(0.0, float(gap @ gap + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross))


def _root(sigma: Matrix) -> Matrix:
    """Returns the symmetric square root of a covariance (F, F)."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def nearest_distances(samples: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the Euclidean distance (N,) float64 to the nearest reference, and its index (N,).

    Samples and references are (N, ...) and (M, ...); no N x M table is kept.
    """
    rows = [_nearest(part, references) for part in samples.split(ROWS)]
    values, indices = zip(*rows, strict=True)
    return torch.cat(values), torch.cat(indices)


def _nearest(samples: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    distance = torch.cdist(samples.flatten(1).double(), references.flatten(1).double())
    nearest = distance.min(dim=1)
    return nearest.values, nearest.indices


def nearest_images(samples: Tensor, images: datasets.Images) -> tuple[Tensor, list[int]]:
    """Returns the nearest image (N, C, H, W) in [0, 1] of each sample (Euclidean), and its index.

    Args:
        samples: (N, C, H, W) in [0, 1].
        images: images to search, block by block, so that they need not fit in memory.
    """
    _, indices = nearest_of(samples, images)
    found = datasets.stack(images, indices.tolist()).to(samples.dtype) / 255
    return found, indices.tolist()


def nearest_of(samples: Tensor, images: datasets.Images) -> tuple[Tensor, Tensor]:
    """Returns distance (N,) float64 and index (N,) of the nearest image, as nearest_images does."""
    best = torch.full((len(samples),), torch.inf, dtype=torch.float64)
    indices = torch.full((len(samples),), -1)
    size = max(1, ELEMENTS // samples[0].numel())
    for first in range(0, len(images), size):
        block = datasets.stack(images, list(range(first, min(first + size, len(images))))) / 255
        distance, index = _nearest(samples, block)
        nearer = distance < best
        best[nearer], indices[nearer] = distance[nearer], first + index[nearer]
    return best, indices


def eight_by_eight(images: Tensor) -> Matrix:
    """Returns 64 features of digits (N, 1, H, W) in [0, 1]: the 8x8 image, by area averaging."""
    return F.adaptive_avg_pool2d(images.float(), 8).flatten(1).double().numpy()


@functools.cache
def digit_classifier(size: int) -> object:
    """Trains a one-vs-rest RBF-SVM on the training digits, enlarged to `size`, reduced to 8x8."""
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import SVC

    images, labels = datasets.digits("train", size)
    svm = OneVsRestClassifier(SVC(kernel="rbf", C=10.0, gamma="scale"))
    return svm.fit(eight_by_eight(images / 255), labels.numpy())


@dataclasses.dataclass(frozen=True)
class DigitFigures:
    """Quality of samples of a model of digits, beside real ones.

    Attributes:
        n: number of samples.
        class_share: share of the samples in each of the ten classes, by the classifier.
        recognised: share whose top-class margin exceeds the 5th percentile of held-out digits.
        held_out_accuracy: the classifier's accuracy on held-out digits.
        frechet: distance of samples to held-out digits, in the features below.
        frechet_train: distance of training digits to held-out digits.
        nearest_train: median distance of a sample to its nearest training digit.
        nearest_train_held_out: the same for held-out digits; copies would be far below it.
        copies: share of the samples nearer to a training digit than 99 % of held-out digits are.
    """

    n: int
    class_share: list[float]
    recognised: float
    held_out_accuracy: float
    frechet: float
    frechet_train: float
    nearest_train: float
    nearest_train_held_out: float
    copies: float


def digit_figures(samples: Tensor) -> DigitFigures:
    """Computes the figures of samples (N, 1, S, S) in [0, 1] of a model of the UCI digits.

    The classifier is an SVM, the margin its largest one-vs-rest one, the features 8x8 pixels.
    """
    size = samples.shape[-1]
    train, _ = datasets.digits("train", size)
    held_out, labels = datasets.digits("held-out", size)
    train, held_out = train / 255, held_out / 255
    svm = digit_classifier(size)
    margin_real = svm.decision_function(eight_by_eight(held_out))  # type: ignore[attr-defined]
    margin = svm.decision_function(eight_by_eight(samples))  # type: ignore[attr-defined]
    threshold = np.percentile(margin_real.max(axis=1), 5)
    share = np.bincount(margin.argmax(axis=1), minlength=10) / len(samples)
    nearest, _ = nearest_distances(samples, train)
    nearest_real, _ = nearest_distances(held_out, train)
    return DigitFigures(
        n=len(samples),
        class_share=share.tolist(),
        recognised=float((margin.max(axis=1) > threshold).mean()),
        held_out_accuracy=float((margin_real.argmax(axis=1) == labels.numpy()).mean()),
        frechet=frechet_distance(eight_by_eight(samples), eight_by_eight(held_out)),
        frechet_train=frechet_distance(eight_by_eight(train), eight_by_eight(held_out)),
        nearest_train=float(nearest.median()),
        nearest_train_held_out=float(nearest_real.median()),
        copies=float((nearest < nearest_real.quantile(0.01)).double().mean()),
    )
