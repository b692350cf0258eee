"""Common behaviour of all commands: parsing, logging, exit codes, one-line errors."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tyro

T = TypeVar("T")

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


class UsageError(ValueError):
    """Error of an invalid command line; exit code 2."""


def parse(
    options: type[T], args: list[str] | None, prog: str, description: str, default: T | None = None
) -> T:
    """Parses command-line arguments into a dataclass of options.

    Raises:
        UsageError: invalid arguments, in one line.   SystemExit(0): after --help.
    """
    settings: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _no_garbage_collection():
            return tyro.cli(options, args=args, prog=prog, description=description, **settings)
    except SystemExit as stop:
        if stop.code != USAGE:
            raise
        raise UsageError(f"{_first_sentence(said.getvalue())} See {prog} --help.") from None
    except ValueError as error:  # a dataclass that refuses its values
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Suspends garbage collection: one over all that torch imports takes longer than parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _first_sentence(box: str) -> str:
    """Returns tyro's message, without the title of its box, up to the first rule, as one line."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╰╯ ")
        if text.strip("─-"):
            words.append(text)
        elif words:
            break
    text = re.sub(r"^Error parsing \w+: ", "", " ".join(words))
    return text if text.endswith(".") else f"{text}."


def run(main: Callable[[], int]) -> int:
    """Runs a command; returns 1 for a failure, 2 for a usage error, 130 for Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ncsn_fast").setLevel(logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)
    try:
        return main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
        return FAILURE
