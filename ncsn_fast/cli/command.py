"""Common behaviour of all commands: parsing, logging, signals, exit codes, one-line errors.

It imports nothing that takes time: a command's module imports this one first, and the rest under
`run_module`, so that Ctrl-C in the first seconds ends it as it does later. The options of a command
are in a module of their own, cli/NAME_options.py, which does without torch: --help and usage errors
do not wait for it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TypeVar

from ncsn_fast.names import suggestion

T = TypeVar("T")

FAILURE, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # 128 + the signal for the last two


class UsageError(ValueError):
    """Error of an invalid command line; exit code 2."""


def parse(
    options: type[T], args: list[str] | None, prog: str, description: str, default: T | None = None
) -> T:
    """Parses command-line arguments into a dataclass of options.

    Raises:
        UsageError: invalid arguments, in one line.   SystemExit(0): after --help.
    """
    import tyro

    settings: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _no_garbage_collection():
            return tyro.cli(options, args=args, prog=prog, description=description, **settings)
    except SystemExit as stop:
        if stop.code != USAGE:
            raise
        raise UsageError(f"{_in_one_line(said.getvalue())} See {prog} --help.") from None
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


def _choices(match: re.Match[str]) -> str:
    names = sorted(set(re.findall(r"'([^']*)'", match[3])) - {"None"})
    return f"{match[1]}{suggestion(match[2], names)}. Expected one of {', '.join(names)}"


def _kind(match: re.Match[str]) -> str:
    words = {"INT": "an integer", "FLOAT": "a number"}
    kinds = [words.get(kind, kind) for kind in match[2].split("|") if kind != "{None}"]
    return f"{match[1]} must be {' or '.join(kinds)}; got {match[3]}"


# tyro's words, and plain ones.
_PLAIN: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"^Error parsing \w+: "), ""),
    (re.compile(r"Error parsing (--\S+): no type matching (\S+) could .* from \[(.*)\]"), _kind),
    (re.compile(r"(?:Error parsing )?(--\S+): invalid literal for int\(\) with base 10: "),
     r"\1 must be an integer; got "),
    (re.compile(r"(?:Error parsing )?(--\S+): could not convert string to float: "),
     r"\1 must be a number; got "),
    (re.compile(r"Error parsing (--\S+): "), r"\1: "),
    (re.compile(r"(invalid choice '(.*)' for argument '\S+')\. Expected one of \(([^()]*)\)"),
     _choices),
)  # fmt: skip


def _in_one_line(box: str) -> str:
    """Returns tyro's message up to the first rule, in one line, with the options it may have meant.

    The title of its box is left out.
    """
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip("│╰╯ ")
        if text.strip("─-"):
            parts[-1].append(text)
        elif parts[-1]:
            parts.append([])
    first, *others = (" ".join(part) for part in parts)
    for pattern, plain in _PLAIN:
        first = pattern.sub(plain, first)
    return first.removesuffix(".") + _meant(first, others) + "."


def _meant(message: str, others: list[str]) -> str:
    """Returns " (did you mean ...?)" from the other parts of tyro's message; "" if they have none.

    They are "Perhaps you meant: --option ...", "Arguments similar to --given: --option ..." and
    "Available subcommands: name, ...".
    """
    text = " ".join(others)
    similar = r"(?:Perhaps you meant|Arguments similar to \S+): (--[\w-]+)"
    given = re.findall(r"--[\w-]+", message)
    options = sorted({name for name in re.findall(similar, text) if name not in given})
    if options:
        return f" (did you mean {' and '.join(options)}?)"
    word = re.match(r"Unrecognized options: (\w[\w-]*)", message)
    commands = re.search(r"Available subcommands: ([\w, -]+)", text)
    return suggestion(word[1], commands[1].split(", ")) if word and commands else ""


class _Lines(logging.Formatter):
    """Log lines of commands: warnings begin with a word that tells them from the others."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return f"warning: {line}" if record.levelno >= logging.WARNING else line


class Terminated(BaseException):
    """SIGTERM: like KeyboardInterrupt, nothing but the end of a command catches it."""


def single_process(prog: str) -> None:
    """Raises UsageError in one of several processes that torchrun, or the like, has started."""
    ranks = os.environ.get("WORLD_SIZE", "")
    if ranks not in ("", "0", "1"):
        raise UsageError(
            f"{prog} runs in one process, and WORLD_SIZE={ranks} says that {ranks} were started, "
            "each of which would do all of the work: start it without torchrun"
        )


def run_module(name: str, args: list[str] | None = None) -> int:
    """Parses the options of a command, then imports ncsn_fast.<name> and runs it.

    Signals end it from the first moment on.
    """
    with _handlers({signal.SIGINT: _leave, signal.SIGTERM: _leave}):
        try:
            options = importlib.import_module(f"ncsn_fast.cli.{name}_options").parse(args)
        except UsageError as error:
            return _refuse(error)
        module = importlib.import_module(f"ncsn_fast.{name}")
    return run(lambda: module.run(options))


def _refuse(error: UsageError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return USAGE


def run(main: Callable[[], int]) -> int:
    """Runs a command and returns its exit code.

    They are 1 for a failure, 2 for a usage error, 130 for Ctrl-C and 143 for SIGTERM. SIGTERM
    unwinds the command as Ctrl-C does, so that temporary files are removed; a second one kills it.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("ncsn_fast").setLevel(logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)
    try:
        with _handlers({signal.SIGTERM: _terminate}):
            return main()
    except UsageError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print("terminated", file=sys.stderr)
        return TERMINATED
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
        return FAILURE


Handler = Callable[[int, FrameType | None], object]


@contextlib.contextmanager
def _handlers(wanted: dict[signal.Signals, Handler]) -> Iterator[None]:
    """Sets handlers of signals that have Python's own, in the main thread, and restores them."""
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: h for n in wanted if (h := signal.getsignal(n)) in usual}
    try:
        for number in before:
            signal.signal(number, wanted[number])
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process at once: an exception could be lost inside a half imported library."""
    os.write(2, b"interrupted\n" if number == signal.SIGINT else b"terminated\n")
    os._exit(128 + number)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise Terminated
