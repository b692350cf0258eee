"""Options of `python -m ncsn_fast.sample`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ncsn_fast.cli import command
from ncsn_fast.cli.options import (
    ClassOptions,
    check_count,
    check_gif,
    check_png,
    own_options_first,
)
from ncsn_fast.cli.shard import Shard
from ncsn_fast.cli.shard import parse as parse_shard

FOLDER, GRID = Path("samples"), Path("samples.png")


@own_options_first
@dataclasses.dataclass(frozen=True)
class SampleOptions(ClassOptions):
    """Command-line options of `python -m ncsn_fast.sample`."""

    n: int = 64
    """Number of samples."""
    out: Path | None = None
    """Grid of all samples, as PNG (default samples.png unless --out-dir is given)."""
    out_dir: Path | None = None
    """Folder for one PNG per sample, named by its index; files that exist are not drawn again.
    Several processes always write files (default folder samples)."""
    shard: str | None = None
    """I/K: draw only part I (from 0 to K-1) of K, for job arrays: one call for each I, with the
    same --n and --batch-size. `torchrun --nproc-per-node K -m -- ncsn_fast.sample` divides the
    samples without it (the -- keeps torchrun from reading --n as its own option)."""
    columns: int | None = None
    """Images per row of the grid."""
    animate: Path | None = None
    """GIF of the chains on their way from noise to the samples, as the grid shows them."""
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the estimated work and time, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--n", self.n)
        check_png("--out", self.out)
        check_gif("--animate", self.animate)
        if self.animate is not None and (self.out_dir is not None or self.shard is not None):
            raise ValueError(
                "--animate needs the chains of all samples in one process: leave out --out-dir and "
                "--shard"
            )
        if self.columns is not None:
            check_count("--columns", self.columns)
        if self.part() is not None and self.out is not None:
            raise ValueError(
                "--out needs all samples, and a --shard has some of them; when all are drawn, run "
                f"the same command without --shard, with --out-dir {self.out_dir or FOLDER}: it "
                "finds the files, draws nothing and writes the grid"
            )

    def part(self) -> Shard | None:
        """Returns the value of --shard, or None."""
        return None if self.shard is None else parse_shard(self.shard)


def parse(args: list[str] | None) -> SampleOptions:
    """Parses the command line; UsageError if it is invalid."""
    return command.parse(SampleOptions, args, "ncsn_fast.sample", "Draw samples from a model.")
