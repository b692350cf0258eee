"""FID, KID and inception scores of images that arrive in batches, computed by torchmetrics.

The network runs once per image; its features and logits feed the three metrics. Memory does not
grow with the number of images. FID keeps sums; evaluation/metrics.py computes the distance from
them, exactly even for singular covariances. KID keeps the features of at most KID_MAX_IMAGES images
per side; on a subset it is as unbiased as on all images. The inception score keeps the logits of
one split.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ncsn_fast.evaluation.features import Extractor
from ncsn_fast.evaluation.metrics import Statistics, statistics_distance

MIN_SAMPLES_FOR_FID = 10_000  # with fewer samples, a Fréchet distance is not called FID
KID_SUBSETS, KID_SUBSET_SIZE, KID_MAX_IMAGES = 100, 1000, 5000
IS_SPLITS = 10


class _PrecomputedFeatures(nn.Module):
    """Identity, in place of the network that torchmetrics expects."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class Fidelity:
    """FID, KID and inception score of samples against references.

    Args:
        n, n_references: numbers of samples and reference images to be added; n_references is None
            if statistics are given instead.
        seed: of KID's subsets.
    """

    def __init__(
        self, extractor: Extractor, n: int, n_references: int | None, *, seed: int = 0
    ) -> None:
        self.extractor, self.seed = extractor, seed
        self.total = {False: n, True: n_references or 0}
        self.added = {False: 0, True: 0}
        given = _PrecomputedFeatures(extractor.num_features)
        self._fid = _metric("fid", "FrechetInceptionDistance", feature=given, normalize=True)
        self._references: Statistics | None = None
        self._kid: Any = None
        self._is: Any = None
        self._scores: list[float] = []
        self.subset_size = min(KID_SUBSET_SIZE, KID_MAX_IMAGES, min(n, n_references or 0) // 2)
        if self.subset_size > 1:
            self._kid = _metric(
                "kid", "KernelInceptionDistance",
                feature=given, subsets=KID_SUBSETS, subset_size=self.subset_size, normalize=True,
            )  # fmt: skip
        if extractor.classes:
            self._is = _metric("inception", "InceptionScore", feature=given, splits=1)
        for metric in filter(None, (self._fid, self._kid, self._is)):
            metric.to(extractor.place.device)

    def add(self, images: Tensor, *, real: bool) -> None:
        """Adds a batch of uint8 images (N, 1 or 3, H, W): references (real) or samples."""
        first, total = self.added[real], self.total[real]
        if first + len(images) > total:
            raise ValueError(f"expected {total} images; got {first + len(images)}")
        features, logits = self.extractor(images)
        features = features.double()
        self._fid.update(features, real=real)
        if self._kid is not None:
            i = torch.arange(first, first + len(images), device=features.device)
            most = min(total, KID_MAX_IMAGES)
            kept = (i + 1) * most // total > i * most // total  # evenly: `most` of all
            self._kid.update(features[kept], real=real)
        if logits is not None and self._is is not None and not real:
            self._add_logits(first, logits.double())
        self.added[real] += len(images)

    def _add_logits(self, row: int, logits: Tensor) -> None:
        """Adds logits (N, K) of samples row, row + 1, ...; scores each split at its end."""
        ends = {k * self.total[False] // IS_SPLITS for k in range(1, IS_SPLITS + 1)} - {0}
        cuts = [end - row for end in sorted(ends) if row < end < row + len(logits)]
        for part in logits.tensor_split(cuts):
            row += len(part)
            self._is.update(part)
            if row in ends:
                self._scores.append(float(_quiet(self._is.compute)[0]))
                self._is.reset()

    def use_references(self, statistics: Statistics) -> None:
        """Uses given statistics of the references."""
        self._references = statistics

    def statistics(self, *, real: bool) -> Statistics:
        """Returns statistics of the images added so far (at least two), or the given references."""
        if real and self._references is not None:
            return self._references
        if (n := self.added[real]) < 2:
            side = "references" if real else "samples"
            raise ValueError(f"a Fréchet distance needs two {side} at least; got {n}")
        side = "real" if real else "fake"
        total, squares = (
            getattr(self._fid, f"{side}_features_{what}").cpu() for what in ("sum", "cov_sum")
        )
        mu = total / n
        sigma = (squares - n * torch.outer(mu, mu)) / (n - 1)
        return Statistics(mu.numpy(), sigma.numpy(), n)

    def figures(self) -> dict[str, Any]:
        """Returns all figures with their conditions, for JSON.

        A Fréchet distance is called `fid` if it is of enough samples and of Inception features,
        else `frechet_distance`; `note` says what it cannot be compared with.
        """
        n = self.added[False]
        comparable = n >= MIN_SAMPLES_FOR_FID and self.extractor.inception
        name = "fid" if comparable else "frechet_distance"
        distance = statistics_distance(self.statistics(real=False), self.statistics(real=True))
        found: dict[str, Any] = {"n": n, name: distance}
        if note := self._note(n):
            found["note"] = note
        found["kid"] = self._kid_figures()
        found["inception_score"] = self._score_figures()
        return found

    def _note(self, n: int) -> str:
        notes = []
        if n < MIN_SAMPLES_FOR_FID:
            notes.append(f"of {n} samples: not comparable with published FIDs, which use 50 000")
        if not self.extractor.inception:
            notes.append("not of Inception features: not comparable with any published FID")
        if min(n, self.added[True] or n) <= self.extractor.num_features:
            notes.append(
                f"fewer images than {self.extractor.num_features} features: the covariance is "
                "singular, and the distance biased upwards"
            )
        return "; ".join(notes)

    def _kid_figures(self) -> dict[str, Any]:
        if self._kid is None:
            few = "the reference is mu and sigma; KID needs the images"
            return {"left_out": few if not self.total[True] else "too few images"}
        mean, std = _quiet(self._kid.compute, self.seed)
        return {
            "mean": float(mean),
            "std": float(std),
            "subsets": KID_SUBSETS,
            "subset_size": self.subset_size,
            "samples": min(KID_MAX_IMAGES, self.total[False]),
            "references": min(KID_MAX_IMAGES, self.total[True]),
        }

    def _score_figures(self) -> dict[str, Any]:
        if self._is is None:
            return {"left_out": "the extractor gives no logits"}
        scores = np.asarray(self._scores)
        std = float(scores.std())  # over splits, divisor n, as published
        return {"mean": float(scores.mean()), "std": std, "splits": len(scores)}


def _metric(module: str, name: str, **options: Any) -> Any:
    try:
        found = importlib.import_module(f"torchmetrics.image.{module}")
    except ImportError as error:
        raise ValueError(
            f"{name} needs the `torchmetrics` package ({error}): pip install 'ncsn_fast[eval]'"
        ) from error
    return _quiet(lambda: getattr(found, name)(**options))


def _quiet(call: Callable[[], Any], seed: int = 0) -> Any:
    """Calls torchmetrics without its warnings on memory; random generators are left unchanged.

    It draws from the CPU's default generator; only that one is seeded, as torch.manual_seed would
    reseed GPUs, too.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.default_generator.manual_seed(seed)
        return call()
