"""Options of `python -m ncsn_fast.evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ncsn_fast.cli import command
from ncsn_fast.cli.options import (
    ClassOptions,
    ModelOptions,
    check_count,
    check_png,
    method_argument,
    own_options_first,
)
from ncsn_fast.data.decode import parse_colour

TOLERANCE = 1e-5  # of --bpd, as published


@own_options_first
@dataclasses.dataclass(frozen=True)
class EvaluateOptions(ClassOptions):
    """Command-line options of `python -m ncsn_fast.evaluate`."""

    n: int | None = None
    """Number of samples (1000 if not given), or of images with --bpd (all if not given)."""
    out: Path | None = None
    """JSON file for the figures (they are always printed)."""
    out_dir: Path | None = None
    """Folder for finished work, so that nothing is repeated: one PNG per sample, as `sample` writes
    them, or the likelihood of each image."""
    extractor: str | None = None
    """Compute FID, KID and the inception score from its features: digits or mnist (small
    classifiers trained on them), weights of the FID's Inception network (.safetensors or .pth), or
    MODULE:NAME, a Python function of yours: uint8 images (N, 3, H, W) -> features (N, F) or
    (features, logits). Nothing is downloaded."""
    reference: str | None = None
    """Reference of the samples: digits:train, digits:held-out (the default of the digits'
    extractor), images in any format of train --data, or an .npz file with mu and sigma."""
    save_reference: Path | None = None
    """Write the reference's mu and sigma to this .npz file, to be given as --reference later."""
    grid: Path | None = None
    """PNG: the first 64 samples."""
    neighbours: Path | None = None
    """PNG: the first 16 samples, and below each its nearest image of --data."""
    data: str | None = None
    """Images that --bpd measures (held-out digits if not given), or that --neighbours searches
    (training digits if not given): digits:train, digits:held-out, or images in any format of
    train --data."""
    background: str = "white"
    """Colour below the transparent pixels of --data and --reference."""
    skip_damaged: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave out images of --data and --reference that cannot be read; they are counted."""
    bpd: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compute the bits per dimension of --data under the model, and draw no samples."""
    trace: Literal["rademacher", "gaussian", "exact"] = "rademacher"
    """Divergence: estimated with probes of +1 and -1 or Gaussian ones, or exact (as many gradients
    as an image has elements)."""
    n_probes: int = 1
    """Probes per image."""
    rtol: Annotated[float | None, method_argument("rtol", f"{TOLERANCE} for --bpd; ")] = None
    atol: Annotated[float | None, method_argument("atol", f"{TOLERANCE} for --bpd; ")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--n", self.samples(), least=1 if self.bpd else 10)
        check_count("--n-probes", self.n_probes)
        for name, value in (("--batch-size", self.batch_size), ("--threads", self.threads)):
            check_count(name, 1 if value is None else value)
        check_png("--grid", self.grid)
        check_png("--neighbours", self.neighbours)
        parse_colour(self.background)
        rtol, atol = self.tolerances()
        if self.bpd and not (1e-6 < rtol < 1 and 0 < atol < 1):
            raise ValueError(
                f"--rtol must be in (1e-6, 1), as the network computes in float32, and --atol in "
                f"(0, 1); got {rtol} and {atol}"
            )
        if self.save_reference is not None and self.save_reference.suffix != ".npz":
            raise ValueError(f"--save-reference must end in .npz; got {str(self.save_reference)!r}")
        self._refuse_idle()
        if self.extractor not in (None, "digits") and self.reference is None:
            raise ValueError("--extractor needs a --reference: images, or an .npz file")

    def draws(self) -> bool:
        return not self.bpd

    def samples(self) -> int:
        """Returns the number of samples."""
        return 1000 if self.n is None else self.n

    def tolerances(self) -> tuple[float, float]:
        """Returns rtol and atol of --bpd."""
        rtol = TOLERANCE if self.rtol is None else self.rtol
        return rtol, TOLERANCE if self.atol is None else self.atol

    def _refuse_idle(self) -> None:
        """Raises ValueError for options that would have no effect."""
        of_bpd = {"trace", "n_probes"}
        of_extractor = {"reference", "save_reference"}
        shared = {f.name for f in dataclasses.fields(ModelOptions)}
        shared |= {"seed", "start", "rtol", "atol"}
        of_samples = {f.name for f in dataclasses.fields(ClassOptions)} - shared
        of_samples |= {"extractor", "grid", "neighbours", *of_extractor}
        given = {
            f.name
            for f in dataclasses.fields(self)
            if f.default is not dataclasses.MISSING and getattr(self, f.name) != f.default
        }
        for names, ok, why in (
            (of_samples, not self.bpd, "is for samples, and --bpd draws none"),
            (of_bpd, self.bpd, "is for --bpd"),
            (of_extractor, self.extractor is not None, "needs an --extractor"),
            ({"data"}, self.bpd or self.neighbours, "is for --bpd or --neighbours"),
            (
                {"background", "skip_damaged"},
                self.data or self.reference,
                "is for --data or --reference",
            ),
        ):
            if not ok and (idle := sorted(names & given)):
                raise ValueError(f"--{idle[0].replace('_', '-')} {why}")
        plain = self.engine in ("auto", "eager") and self.dtype in (None, "fp32")
        if self.bpd and not (plain and not self.engine_options):
            raise ValueError(
                "--bpd needs gradients, which engines do not give: it runs the network itself, in "
                "float32; leave --engine, --engine-options and --dtype out"
            )


def parse(args: list[str] | None) -> EvaluateOptions:
    """Parses the command line; UsageError if it is invalid."""
    return command.parse(
        EvaluateOptions, args, "ncsn_fast.evaluate",
        "Figures of merit of a model: of its samples, or (--bpd) of the likelihood of images.",
    )  # fmt: skip
