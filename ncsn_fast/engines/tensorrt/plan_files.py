"""Files of a folder of compiled engines: locks, last use, sizes and eviction.

`<key>.plan` is an engine and `<key>.blob` other bytes, both signed (signed_file.py). `<key>.lock`
is locked by the process that writes one of them. Leftovers of `files.atomic_write` in a killed
process count with their file.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from ncsn_fast.data.limits import size_text
from ncsn_fast.engines.tensorrt.signed_file import (
    PlanRefused,
    canonical,
    ensure_private_folder,
    read_plan,
)

log = logging.getLogger(__name__)
_NOTICE_AFTER = 3.0  # seconds of waiting for another process before logging it
_NAME = re.compile(r"\.?(?P<name>[0-9a-f]{64}\.(?:plan|blob))(?:\.[^.]+\.tmp)?")


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes:
        path: its path.
        size: bytes, including leftovers of killed processes.
        last_use: seconds since 1970.
        facts, notes: as in Stored; empty if there is a problem.
        problem: why it would be refused, or None.
    """

    path: Path
    size: int
    last_use: float
    facts: dict[str, Any]
    notes: dict[str, Any]
    problem: str | None


@dataclass(frozen=True)
class Group:
    """A file of the cache, if it exists, with the leftovers of killed processes."""

    path: Path
    parts: dict[Path, os.stat_result]

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.st_size for part in self.parts.values())

    @property
    def last_use(self) -> float:
        """Seconds since 1970; a cache hit sets the modification time of the file."""
        return max(part.st_mtime for part in self.parts.values())


def path_of(folder: Path, facts: Mapping[str, Any], suffix: str) -> Path:
    """Returns the path for these facts: its name is their SHA-256, as canonical JSON."""
    return folder / f"{hashlib.sha256(canonical(facts).encode()).hexdigest()}.{suffix}"


def groups(folder: Path) -> list[Group]:
    """Lists the files of a folder with their leftovers, least recently used first.

    Raises:
        PlanRefused: the folder does not belong to this user alone.
    """
    if not os.path.lexists(folder):
        return []
    ensure_private_folder(folder)
    found: dict[str, dict[Path, os.stat_result]] = {}
    for file in folder.iterdir():
        if match := _NAME.fullmatch(file.name):
            with contextlib.suppress(FileNotFoundError):  # just renamed, or deleted
                found.setdefault(match["name"], {})[file] = file.lstat()
    known = [Group(folder / name, parts) for name, parts in found.items() if parts]
    return sorted(known, key=lambda group: group.last_use)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file of the cache, and logs a long wait.

    The system frees the lock if the process is killed.
    """
    lock = _lock(path)
    try:
        lock.acquire(timeout=_NOTICE_AFTER)
    except filelock.Timeout:
        log.info("another process builds this engine (%s); waiting for it", path.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def drop(group: Group) -> bool:
    """Deletes a file unless it is locked or was used meanwhile; returns whether it did.

    The empty lock file stays: if it were deleted, two processes could hold two locks of one name.
    """
    lock = _lock(group.path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    try:
        with contextlib.suppress(FileNotFoundError):
            found = group.path.lstat()
            if found.st_mtime > group.last_use or stat.S_ISDIR(found.st_mode):
                return False
        for part in group.parts:
            part.unlink(missing_ok=True)
    finally:
        lock.release()
    return True


def evict(folder: Path, limit: int) -> int:
    """Deletes the least recently used files until the rest is within the limit.

    Files whose lock is held stay: those being built, and the one that the caller has just written.

    Returns:
        Bytes that remain.
    """
    known = groups(folder)
    total = sum(group.size for group in known)
    for group in known:
        if total > limit and drop(group):
            log.info("%s made room: the cache may take %s", group.path.name, size_text(limit))
            total -= group.size
    return total


def entry(group: Group) -> Entry:
    """Reads and verifies a file."""
    problem, stored = None, None
    try:
        stored = read_plan(group.path)
    except FileNotFoundError:
        problem = "is unfinished: it is being written, or who wrote it was killed"
    except PlanRefused as error:
        problem = error.reason
    suffix = group.path.suffix.removeprefix(".")
    if stored is not None and group.path != path_of(group.path.parent, stored.facts, suffix):
        problem, stored = "was built for something else: its name is not the key of its facts", None
    facts, notes = (stored.facts, stored.notes) if stored is not None else ({}, {})
    return Entry(group.path, group.size, group.last_use, facts, notes, problem)


def _lock(path: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(path.with_suffix(".lock"), mode=0o600)
