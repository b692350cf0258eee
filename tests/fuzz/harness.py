"""What all fuzzers share: which errors are ours, and many executions with their figures."""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import logging
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST_FAILURES = 20  # that are described


@functools.cache
def folder() -> Path:
    """Returns an empty folder of this process, which is deleted at its end."""
    held = tempfile.TemporaryDirectory(prefix="ncsn_fast_fuzz_")
    atexit.register(held.cleanup)
    return Path(held.name)


def reads(
    name: str, read: Callable[[], Any], kinds: tuple[type[Exception], ...], named: str = ""
) -> bool:
    """Returns whether something could be read.

    Args:
        name: of the reader, for messages.
        kinds: the errors by which it may refuse, exactly these types.
        named: what every message must contain.

    Raises:
        AssertionError: it raised something else, several lines, or a message without the name.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            read()
    except Exception as error:
        text = str(error)
        fault = ""
        if type(error) not in kinds:
            fault = repr(error)
        elif "\n" in text:
            fault = f"several lines: {error!r}"
        elif named not in text:
            fault = f"no file name: {text}"
        if fault:
            raise AssertionError(f"{name}: {fault:.500}") from error
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without log lines below errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def run(
    mutate: Callable[[int], bytes],
    check: Callable[[bytes], dict[str, bool]],
    n: int,
    first: int = 0,
    begins: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Checks the files of n seeds; how many each reader took, and the first failures.

    Args:
        begins: called with each seed before its file is made.
    """
    taken: collections.Counter[str] = collections.Counter()
    failures, slowest, began = [], (0.0, first), time.perf_counter()
    for seed in range(first, first + n):
        since = time.perf_counter()
        if begins is not None:
            begins(seed)
        try:
            with quiet():
                taken.update({name: int(ok) for name, ok in check(mutate(seed)).items()})
        except AssertionError as error:
            failures.append(f"seed {seed}: {error}")
        except Exception as error:  # outside of `reads`: memory, a mistake of the fuzzer
            failures.append(f"seed {seed}: {error!r:.500}")
        slowest = max(slowest, (time.perf_counter() - since, seed))
    return {
        "executions": n,
        "first_seed": first,
        "read": dict(taken),
        "failures": len(failures),
        "first_failures": failures[:MOST_FAILURES],
        "slowest_seconds": round(slowest[0], 3),
        "slowest_seed": slowest[1],
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
    }
