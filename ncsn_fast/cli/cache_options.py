"""Options of `python -m ncsn_fast.cache list|clear`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from ncsn_fast.cli import command


@dataclasses.dataclass(frozen=True)
class List:
    """List cached engines: size, last use and what each was built for. Every file is verified."""

    folder: Path | None = None
    """Folder of the engines; without it ~/.cache/ncsn_fast/engines (below $XDG_CACHE_HOME, where
    that is set)."""


@dataclasses.dataclass(frozen=True)
class Clear:
    """Delete cached engines, except those being built at this moment."""

    folder: Path | None = None
    """Folder of the engines; without it ~/.cache/ncsn_fast/engines (below $XDG_CACHE_HOME, where
    that is set)."""
    older_than: float = 0.0
    """Only engines that were last used more than this many days ago."""

    def __post_init__(self) -> None:
        if not 0 <= self.older_than < math.inf:
            raise ValueError(
                f"--older-than must be a number of days from 0 on; got {self.older_than}"
            )


Command = (
    Annotated[List, tyro.conf.subcommand("list")] | Annotated[Clear, tyro.conf.subcommand("clear")]
)


def parse(args: list[str] | None) -> List | Clear:
    """Parses the command line; UsageError if it is invalid."""
    found = command.parse(cast(Any, Command), args, "ncsn_fast.cache", "Compiled engines, kept.")
    return cast(List | Clear, found)
