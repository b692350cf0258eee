"""Options of `python -m ncsn_fast.tune`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ncsn_fast.cli import command
from ncsn_fast.cli.options import ModelOptions, check_count, own_options_first
from ncsn_fast.data.decode import parse_colour


@own_options_first
@dataclasses.dataclass(frozen=True)
class TuneOptions(ModelOptions):
    """Command-line options of `python -m ncsn_fast.tune`."""

    nfe: int = 10
    """Network evaluations per sample: the rows of the table."""
    budget: float = 30.0
    """Minutes of search; all sittings that share a --state count."""
    candidates: int | None = None
    """Most tables to try, in generations of 10 (if not given: as many as the budget allows). The
    result is then the same on a machine of another speed."""
    data: str | None = None
    """Reference images: digits:train, or images in any format of train --data. Without it, samples
    of the model's own ald."""
    loss: Literal["energy", "mmd", "frechet", "kid"] = "energy"
    """Distance between samples and references: energy distance or MMD of the images and of what the
    denoiser makes of them, and with an --extractor of its features and how sure its classifier is;
    Fréchet distance or KID of its features alone."""
    extractor: str | None = None
    """Extractor of features, as of evaluate: digits, mnist, a file of weights, or MODULE:NAME."""
    samples: int = 512
    """Samples of a candidate."""
    references: int | None = None
    """Number of references (if not given: at most 2000 of --data, or 1000 samples)."""
    start_mean: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start chains around the mean of the data, which the denoiser estimates, instead of 0."""
    initial: str | None = None
    """Model whose tuned table, of any number of rows, the search starts from. If not given: the
    default table."""
    seed: int = 0
    """Seed of the search and of all noise."""
    background: str = "white"
    """Colour below the transparent pixels of --data."""
    state: Path | None = None
    """Folder in which the search is kept, so that it goes on after an interruption. If not given:
    tune-MODEL-NFE in the working folder."""
    out: Path | None = None
    """Model folder to write, with the model and its table. If not given: --model, if it is a model
    folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--nfe", self.nfe, least=2, most=1000)
        check_count("--samples", self.samples, least=2)
        if self.candidates is not None:
            check_count("--candidates", self.candidates, least=0)
        if self.references is not None:
            check_count("--references", self.references, least=2)
        if not 0 <= self.budget < 10**6:
            raise ValueError(f"--budget must be minutes, below 1000000; got {self.budget}")
        if not 0 <= self.seed < 2**15 - 1:
            raise ValueError(f"--seed must be in [0, {2**15 - 1}); got {self.seed}")
        if self.loss in ("frechet", "kid") and self.extractor is None:
            raise ValueError(f"--loss {self.loss} needs an --extractor, of whose features it is")
        if self.data is None and self.background != "white":
            raise ValueError("--background is for --data")
        parse_colour(self.background)


def parse(args: list[str] | None) -> TuneOptions:
    """Parses the command line; UsageError if it is invalid."""
    return command.parse(
        TuneOptions, args, "ncsn_fast.tune",
        "Fit the table of --method fast to a model: better samples of as few evaluations.",
    )  # fmt: skip
