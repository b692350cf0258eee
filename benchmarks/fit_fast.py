"""Compares tables that may become the default of `fast`, on data that it is not judged on.

The data are a small NCSNv2 of MNIST at 8x8 pixels, and mixtures with an exact score, of other
deviations and around other digits than those of quality.py:

    python -m ncsn_fast.train --data MNIST --image-size 8 --ngf 16 --steps 5000 --decay \
        --no-ema-warmup --name mnist8
    python benchmarks/fit_fast.py --model runs/mnist8 --data MNIST

writes results/fit-fast.json: of each point of the family (samplers/table_family.py) and number of
rows, what an SVM recognises of the network's samples and how far they are from real images, and the
errors of the mixtures' mode weights and variances. The default was chosen from these by hand, for
15 rows whose figures on the network are those of 30 rows with eta 4 or better, with fewer errors of
the modes than 15 such rows have, and variances about as near to 1. quality.py then judged it, on
other data.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import Mixture, Row
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC
from torch import Tensor

from ncsn_fast import Sampler
from ncsn_fast.data import datasets
from ncsn_fast.data.files import atomic_write
from ncsn_fast.evaluation.metrics import Matrix, frechet_distance, nearest_distances
from ncsn_fast.samplers.table_family import TableFamily

Figures = dict[str, list[float]]  # by name, of each seed
OUT = Path(__file__).resolve().parent / "results" / "fit-fast.json"
SEEDS, MIXTURE_SEEDS, SAMPLES = range(100, 103), range(100, 106), 1000
MIXTURES = {0.03: 1, 0.1: 2, 0.25: 3}  # deviation -> which digit of each class is a centre
REAL = {"train": 4000, "test": 2000}  # images
OLD: dict[str, Any] = {"eta": (4.0,) * 4, "history": (1.0,) * 3, "final": 0.0}  # fast until 0.1
POINTS: list[tuple[int, dict[str, Any]]] = [
    (30, OLD),
    (15, OLD),
    (15, {**OLD, "eta": (2.0,) * 4}),
    (15, {**OLD, "eta": (8.0,) * 4}),
    (15, {**OLD, "eta": (2.0, 4.0, 12.0, 12.0)}),
    (15, {**OLD, "history": (1.0, 1.3, 1.0)}),
    (15, {**OLD, "history": (1.0, 1.0, 1.3)}),
    (15, {**OLD, "bend": (0.7, 1.0)}),
    (15, {**OLD, "bend": (1.0, 0.7)}),
    (15, {**OLD, "history": (0.9,) * 3, "final": 0.3}),
    (15, {"eta": (4.0, 6.0, 6.0, 6.0), "history": (1.0, 1.15, 0.9), "final": 0.0}),
    (15, {"eta": (2.0, 5.0, 7.0, 7.0), "history": (1.2, 1.2, 1.0), "final": 0.2}),
    (15, {}),  # the default
]


class Network:
    """A model of MNIST and its judge: an SVM of real images, as of quality.py's digits."""

    def __init__(self, model: str, data: str) -> None:
        self.sampler = Sampler(model, batch_size=64)
        self.model = self.sampler.model
        channels, size, _ = self.model.image_shape
        real = {}
        for split, n in REAL.items():
            images = datasets.open_images(f"{data}:{split}", size=size, channels=channels)
            rows = np.linspace(0, len(images) - 1, n).astype(int).tolist()
            assert images.labels is not None
            real[split] = datasets.stack(images, rows).float() / 255, images.labels[rows].numpy()
        (self.train, labels), (test, test_labels) = real["train"], real["test"]
        self.svm = OneVsRestClassifier(SVC(kernel="rbf", C=10.0, gamma="scale"))
        self.svm.fit(_flat(self.train), labels)
        self.threshold = np.percentile(self.svm.decision_function(_flat(test)).max(axis=1), 5)
        self.share, self.test = np.bincount(test_labels, minlength=10) / len(test), _flat(test)

    def figures(self, steps: int, point: TableFamily) -> Figures:
        """Returns the figures of the samples that a point of the family draws."""
        ladder = self.model.sigmas.double().numpy()
        self.model.tuned = point.table(ladder, steps, self.model.image_shape)
        found: Figures = {}
        for seed in SEEDS:
            x = self.sampler.sample(SAMPLES, seed=seed, method="fast", progress=False)
            margin = self.svm.decision_function(_flat(x))
            share = np.bincount(margin.argmax(axis=1), minlength=10) / len(x)
            of_seed = {
                "recognised": (margin.max(axis=1) > self.threshold).mean(),
                "frechet": frechet_distance(_flat(x), self.test),
                "classes": np.abs(share - self.share).sum() / 2,
                "nearest": nearest_distances(x, self.train)[0].median(),
            }
            for name, value in of_seed.items():
                found.setdefault(name, []).append(round(float(value), 4))
        return found


def of_mixture(mixture: Mixture, steps: int, point: TableFamily) -> Figures:
    """Returns errors of mode weights and variance ratios of a point of the family."""
    found: Figures = {}
    for seed in MIXTURE_SEEDS:
        mixture.table = point.table(mixture.model.sigmas.numpy(), steps, mixture.shape)
        x, _ = mixture.sample(Row("fast", None, {"table": "tuned"}), seed, SAMPLES)
        figures = mixture.figures(x)
        for name in ("total_variation", "variance_ratio"):
            found.setdefault(name, []).append(round(figures[name], 4))
    return found


def _flat(images: Tensor) -> Matrix:
    return images.flatten(1).double().numpy()


def main() -> None:
    """Measures all points and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="the run of MNIST at 8x8")
    parser.add_argument("--data", required=True, help="folder of MNIST's four IDX files")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    network = Network(chosen.model, chosen.data)
    mixtures = {deviation: Mixture(deviation, which) for deviation, which in MIXTURES.items()}
    records = []
    for steps, given in POINTS:
        point = TableFamily(**given)
        figures = {"mnist8": network.figures(steps, point)}
        figures |= {f"mixture-{d}": of_mixture(m, steps, point) for d, m in mixtures.items()}
        settings = {"bend": point.bend, "eta": point.eta, "history": point.history}
        records.append({"rows": steps, **settings, "final": point.final, "figures": figures})
        means = {d: {k: round(statistics.mean(v), 3) for k, v in f.items()}
                 for d, f in figures.items()}  # fmt: skip
        print(steps, given or "the default", means, flush=True)
    with atomic_write(OUT) as path:
        path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")


if __name__ == "__main__":
    main()
