"""Command `python -m ncsn_fast.cache list|clear`: the cache of compiled engines."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("cache"))

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from ncsn_fast.data.limits import size_text
from ncsn_fast.engines.tensorrt.plan_cache import Entry, PlanCache

_DAY = 24 * 3600.0  # seconds
_HEADINGS = ("size", "last use", "what", "model", "dtype", "shapes", "GPU", "TensorRT")


@dataclasses.dataclass(frozen=True)
class List:
    """List cached engines: size, last use and what each was built for. Every file is verified."""

    folder: Path | None = None
    """Folder of the engines; without it ~/.cache/ncsn_fast/engines (below $XDG_CACHE_HOME, where
    that is set)."""

    def run(self) -> None:
        cache = PlanCache(self.folder)
        entries = cache.entries()
        rows = [_HEADINGS, *(_row(entry) for entry in entries)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
        for row, entry in zip(rows, [None, *entries], strict=True):
            if len(rows) > 1:
                cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
                print("  ".join(cells).rstrip())
            if entry is not None and entry.problem is not None:
                print(f"  refused: {entry.path} {entry.problem}")
        taken = size_text(sum(entry.size for entry in entries))
        print(
            f"{cache.folder}: {_count(len(entries))}, {taken} of at most {size_text(cache.limit)}"
        )


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

    def run(self) -> None:
        cache = PlanCache(self.folder)
        number, freed = cache.clear(self.older_than * _DAY if self.older_than else None)
        print(f"{cache.folder}: {_count(number)} deleted, {size_text(freed)} freed")


Command = (
    Annotated[List, tyro.conf.subcommand("list")] | Annotated[Clear, tyro.conf.subcommand("clear")]
)


def _row(entry: Entry) -> tuple[str, ...]:
    """Formats a row of the table; unknown facts are a dash."""
    facts = entry.facts.get("of", entry.facts)
    what = entry.facts.get("blob", entry.path.suffix.removeprefix("."))
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_use))
    model = _text(facts.get("model", entry.notes.get("model")))[
        :12
    ]  # with refit: that of the weights in it
    known = (_text(facts.get(name)) for name in ("dtype", "shapes", "gpu", "tensorrt"))
    return size_text(entry.size), used, what, model, *known


def _text(value: Any) -> str:
    """Formats a fact in a few characters: [4, 3, 8, 8] as 4x3x8x8, named things as their name."""
    if isinstance(value, dict):
        named = (f"{name} {_text(item)}" for name, item in value.items())
        return _text(value["name"]) if "name" in value else ", ".join(named)
    if isinstance(value, list):
        numbers = all(isinstance(item, int) for item in value)
        return ("x" if numbers else ", ").join(_text(item) for item in value) or "-"
    return "-" if value is None else str(value)


def _count(number: int) -> str:
    return f"{number} file{'' if number == 1 else 's'}"


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0, even if a file is refused."""
    options = command.parse(cast(Any, Command), args, "ncsn_fast.cache", "Compiled engines, kept.")
    options.run()
    return 0
