"""Command `python -m ncsn_fast.cache list|clear`: the cache of compiled engines."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("cache"))

import time
from typing import Any

from ncsn_fast.cli.cache_options import Clear, List, parse
from ncsn_fast.data.limits import size_text
from ncsn_fast.engines.tensorrt.plan_cache import Entry, PlanCache

_DAY = 24 * 3600.0  # seconds
_HEADINGS = ("size", "last use", "what", "model", "dtype", "shapes", "GPU", "TensorRT")


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


def list_engines(options: List) -> None:
    """Prints a row for every cached engine."""
    cache = PlanCache(options.folder)
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
    print(f"{cache.folder}: {_count(len(entries))}, {taken} of at most {size_text(cache.limit)}")


def clear_engines(options: Clear) -> None:
    """Deletes cached engines and prints how many."""
    cache = PlanCache(options.folder)
    number, freed = cache.clear(options.older_than * _DAY if options.older_than else None)
    print(f"{cache.folder}: {_count(number)} deleted, {size_text(freed)} freed")


def run(options: List | Clear) -> int:
    """Does what the options say; exit code 0, even if a file is refused."""
    if isinstance(options, List):
        list_engines(options)
    else:
        clear_engines(options)
    return 0


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    return run(parse(args))
