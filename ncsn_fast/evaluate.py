"""`python -m ncsn_fast.evaluate`: draws samples from a model of the digits and judges them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from ncsn_fast import cli, data
from ncsn_fast.files import atomic_write
from ncsn_fast.images import save_grid
from ncsn_fast.metrics import digit_figures, nearest_distances
from ncsn_fast.options import SamplingOptions, check_count, check_png


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(SamplingOptions):
    """The command line of `python -m ncsn_fast.evaluate`."""

    n: int = 1000
    """Number of samples."""
    out: Path | None = None
    """JSON file for the figures (they are always printed)."""
    neighbours: Path | None = None
    """PNG: the first 16 samples, and below each its nearest training digit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--n", self.n, least=10)
        check_png("--neighbours", self.neighbours)


def main(args: list[str] | None = None) -> int:
    """Command line; exit code 0."""
    options = cli.parse(
        EvaluateOptions, args, "ncsn_fast.evaluate", "Figures of merit of a model of the digits."
    )
    sampler = options.sampler()
    channels, height, width = sampler.model.image_shape
    if channels != 1 or height != width:
        raise ValueError(
            f"these figures are for models of the digits (1, S, S); "
            f"this one is {sampler.model.image_shape}"
        )
    samples = sampler.sample(
        options.n,
        seed=options.seed,
        start=options.start,
        progress=not options.quiet,
        **options.method_options(),
    )
    assert sampler.report is not None
    figures = {
        "model": sampler.model.digest(),
        "figures": dataclasses.asdict(digit_figures(samples)),
        "sampling": {
            **dataclasses.asdict(sampler.report),
            **options.method_options(),
            "seed": options.seed,
            "start": options.start,
        },
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if options.out is not None:
        with atomic_write(options.out) as path:
            path.write_text(text + "\n")
    if options.neighbours is not None:
        train = data.digits("train", height)[0] / 255
        _, nearest = nearest_distances(samples[:16], train)
        save_grid(torch.cat((samples[:16], train[nearest])), options.neighbours, len(nearest))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
