"""Processes that are killed at every file-system call that they make below a folder, in turn."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def killed_at_each_call(work: Callable[[], Any], below: Path) -> Iterator[int]:
    """Yields 1, 2, ... after a forked process was killed right before its call of that number.

    Calls are the events of sys.audit that name a path below the folder: open, rename, link, remove,
    chmod, mkdir, ... Ends after the process that comes to the end of `work`.
    """
    number = 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            _die_at(number, str(below))
            try:
                work()
            finally:
                os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            return
        yield number


def _die_at(number: int, below: str) -> None:
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if any(below in os.fspath(a) for a in arguments if isinstance(a, (str, os.PathLike))):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
