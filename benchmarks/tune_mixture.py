"""Fits a table of `fast` to a mixture whose score is exact, for quality.py to judge on another.

`python benchmarks/tune_mixture.py 0.05` fits ten rows to the mixture of quality.py with deviation
0.05, by `ncsn_fast.tune` and its label-free loss, with exact draws as references, and writes
results/tuned-mixture-0.05.json. quality.py runs each such table on both mixtures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from quality import Mixture
from torch import Tensor, nn

import ncsn_fast
from ncsn_fast.data.files import atomic_write
from ncsn_fast.training.tuning import tune

RESULTS = Path(__file__).resolve().parent / "results"
ROWS, REFERENCES, SAMPLES, CANDIDATES = 10, 1000, 384, 120


class Score(nn.Module):
    """The exact score of a mixture, as a network: (x, sigma (N,)) -> score, shape of x."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.mixture.score(x, sigma)


def fit(deviation: float, *, candidates: int = CANDIDATES, references: int = REFERENCES) -> str:
    """Returns the JSON of the table that was found."""
    mixture = Mixture(deviation)
    model = ncsn_fast.wrap(
        Score(mixture), predicts="score", sees="sigma", image_shape=mixture.shape,
        sigmas=mixture.model.sigmas, data_range=None,
    )  # fmt: skip
    found = tune(
        model, nfe=ROWS, candidates=candidates, budget=600, data=mixture.draw(references, seed=0),
        samples=SAMPLES, engine="eager", batch_size=SAMPLES, threads=1,
    )  # fmt: skip
    print(found)
    return json.dumps(found.table.to_dict()) + "\n"


def main() -> None:
    """Fits and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("deviation", type=float, help="of the mixture's modes: 0.05 or 0.15")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="tables to try")
    chosen = parser.parse_args()
    text = fit(chosen.deviation, candidates=chosen.candidates)
    with atomic_write(RESULTS / f"tuned-mixture-{chosen.deviation:g}.json") as path:
        path.write_text(text)


if __name__ == "__main__":
    main()
