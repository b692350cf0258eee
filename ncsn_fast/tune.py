"""Command `python -m ncsn_fast.tune`: fits the table of method "fast" to a model."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("tune"))

import types
from pathlib import Path
from typing import Any

from ncsn_fast.checkpoints.loading import load
from ncsn_fast.cli.arguments import check_source, open_extractor
from ncsn_fast.cli.outputs import check_output_folder
from ncsn_fast.cli.tune_options import TuneOptions, parse
from ncsn_fast.models.tuned_table import TunedTable
from ncsn_fast.training.tuning import Tuned, output_folder, tune


class _Callable(types.ModuleType):
    """Module that can be called: `ncsn_fast.tune(...)` tunes also where the command was imported.

    Importing a submodule sets the package's attribute of its name.
    """

    def __call__(self, *args: Any, **options: Any) -> Tuned:
        return tune(*args, **options)


sys.modules[__name__].__class__ = _Callable


def _table_of(source: str) -> TunedTable:
    """Returns the tuned table of a model; ValueError if it has none."""
    found = load(source).tuned
    if found is None:
        raise ValueError(f"--initial {source} has no tuned table; leave it out, or tune it first")
    return found


def run(options: TuneOptions) -> int:
    """Does what the options say; exit code 0, also where nothing better was found."""
    command.single_process("ncsn_fast.tune")
    check_source(options.data)
    target = output_folder(options.model, options.out)
    assert target is not None  # it is for a model in memory alone
    check_output_folder("--out", target)
    state = options.state or Path(f"tune-{target.absolute().name}-{options.nfe}")
    check_output_folder("--state", state)
    names = (
        "nfe",
        "budget",
        "candidates",
        "data",
        "loss",
        "samples",
        "references",
        "start_mean",
        "seed",
    )
    own = {name: getattr(options, name) for name in (*names, "background", "out")}
    extractor = None if options.extractor is None else open_extractor(options.extractor)
    found = tune(
        options.model,
        extractor=extractor,
        initial=None if options.initial is None else _table_of(options.initial),
        state=state,
        progress=not options.quiet,
        **own,
        **options.sampler_options(),
    )
    print(found)
    return 0


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    return run(parse(args))
