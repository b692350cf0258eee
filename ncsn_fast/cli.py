"""What all commands share: logging, exit codes, and one clear line for a failure."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

T = TypeVar("T")

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


class UsageError(ValueError):
    """A command line that cannot mean anything; exit code 2."""


def parse(
    options: type[T], args: list[str] | None, prog: str, description: str, default: T | None = None
) -> T:
    """Options (a dataclass) from command-line arguments; exits with code 2 on a usage error."""
    settings: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(options, args=args, prog=prog, description=description, **settings)


def run(main: Callable[[], int]) -> int:
    """Runs a command and returns its exit code: 1 for a failure, 2 for a usage error, 130 for
    Ctrl-C."""
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
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
