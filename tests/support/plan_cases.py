"""Helpers for tests of the cache of compiled engines: an engine, damaged files, and processes.

It imports little, so that processes start quickly.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncsn_fast.data import files
from ncsn_fast.engines.tensorrt import signed_file
from ncsn_fast.engines.tensorrt.plan_cache import PlanCache

if TYPE_CHECKING:
    import pytest

FACTS = {"model": "5f" * 32, "dtype": "bf16", "shapes": [[1, 3, 8, 8], [4, 3, 8, 8]], "level": 3}
NOTES = {"error": 1.5e-3, "seconds": 71}
SECONDS = 60  # timeout of a process


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def spoil_link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def spoil_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (flip_last, "is damaged"),
    "cut": (lambda path: os.truncate(path, 100), "is damaged"),
    "empty": (lambda path: os.truncate(path, 0), "is no signed file"),
    "group reads": (lambda path: path.chmod(0o640), "is open to other users (mode 0640)"),
    "others write": (lambda path: path.chmod(0o602), "is open to other users (mode 0602)"),
    "link": (spoil_link, "is a symbolic link"),
    "pipe": (spoil_fifo, "is not a regular file"),
}


def in_home(environment: dict[str, str], target: Callable[..., None], *args: Any) -> None:
    """Runs a target in the test's environment; a fork server would use its own."""
    os.environ.update(environment)
    target(*args)


def race(folder: Path, number: int, barrier: Any) -> None:
    """Fetches concurrently with other processes, and writes down the result."""

    def make() -> tuple[bytes, dict[str, Any]]:
        time.sleep(0.3)  # meanwhile all others arrive
        return f"by {number}".encode(), {}

    barrier.wait(SECONDS)
    stored = PlanCache().fetch(FACTS, make)
    got = {
        "content": stored.content.decode(),
        "built": stored.built,
        "key": str(signed_file.signing_key()),
    }
    (folder / f"{number}.json").write_text(json.dumps(got))


def hang(flag: Path, where: str) -> None:
    """Hangs forever while building, or while writing after a build."""

    def forever(*_: Any) -> Any:
        flag.touch()
        time.sleep(SECONDS)

    if where == "writing":
        signed_file.signing_key(create=True)
        files.os.fsync = forever
    PlanCache().fetch(FACTS, forever if where == "building" else lambda: (b"unfinished", {}))


def build(content: bytes = b"plan") -> Callable[[], tuple[bytes, dict[str, Any]]]:
    return lambda: (content, dict(NOTES))


def never() -> tuple[bytes, dict[str, Any]]:
    raise AssertionError("built although it is kept")


def plan_of(cache: PlanCache, facts: dict[str, Any] = FACTS) -> Path:
    """Returns the path of a plan, computed without the code under test."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return cache.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.plan"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
