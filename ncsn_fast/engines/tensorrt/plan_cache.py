"""Cache of compiled engines: each is built once, and loaded only by the user who built it.

Each is one signed file (signed_file.py), `<key>.plan`, in a folder of mode 0700. The key is the
SHA-256 of the facts that the engine depends on, as canonical JSON, so that an upgrade, another GPU
or other weights give another file and never reuse the old one. A missing or damaged file, or one of
another user, is built anew. The least recently used files are evicted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ncsn_fast.data import files, limits
from ncsn_fast.engines.tensorrt import plan_files
from ncsn_fast.engines.tensorrt.plan_files import Entry, path_of
from ncsn_fast.engines.tensorrt.signed_file import (
    PlanRefused,
    Stored,
    as_json,
    check_facts,
    ensure_private_folder,
    read_plan,
    sign,
    signing_key,
    verify,
    write_plan,
)

log = logging.getLogger(__name__)
LIMIT = 10 * 2**30  # bytes
LIMIT_VARIABLE = "NCSN_FAST_CACHE_LIMIT"
# Modules below engines/ (without ".py", or whole folders) that do not affect a cached engine.
_COMPILE_NOTHING = {
    "__init__", "eager", "compiled", "cpu", "onnx/engine",
    "tensorrt/signed_file", "tensorrt/plan_cache", "tensorrt/plan_files",
}  # fmt: skip


class PlanCache:
    """Compiled engines of this user on this machine.

    Processes and threads may share a folder: a lock, which the system frees if its holder is
    killed, lets one of them build an engine.

    Args:
        folder: None for ncsn_fast/engines in $XDG_CACHE_HOME or ~/.cache. An existing folder must
            belong to the user alone: a real folder, of mode 0700.
        limit: bytes that all files may take together. None for the environment variable
            NCSN_FAST_CACHE_LIMIT ("5GB"), or 10 GiB. A single engine above the limit is kept,
            alone, with a warning.

    Raises:
        ValueError: the limit is not a size.
    """

    def __init__(self, folder: str | Path | None = None, *, limit: int | None = None) -> None:
        default = files.cache_folder() / "engines"
        self.folder = default if folder is None else Path(folder).expanduser()
        if limit is None:
            given = os.environ.get(LIMIT_VARIABLE)
            limit = limits.parse_size(given, LIMIT_VARIABLE) if given else LIMIT
        if limit < 0:
            raise ValueError(f"limit of the cache must be at least 0 bytes; got {limit}")
        self.limit = limit

    def fetch(
        self, facts: Mapping[str, Any], make: Callable[[], tuple[bytes, dict[str, Any]]]
    ) -> Stored:
        """Returns the engine with these facts, from the cache or built by `make`.

        If several processes ask at once, one builds and the others wait; if it fails, the next one
        tries. A file that is damaged or belongs to another user is replaced, with a warning. If
        nothing can be stored (full disk, read-only folder), a warning says so and the engine is
        returned all the same.

        Args:
            make: () -> content and notes. Its exceptions propagate, and nothing is stored.

        Raises:
            PlanRefused: folder or key does not belong to this user alone.
            ValueError: facts or notes are not JSON.
        """
        facts = as_json(facts)
        path = path_of(self.folder, facts, "plan")
        trouble: OSError | None = None
        with contextlib.ExitStack() as held:
            try:
                ensure_private_folder(self.folder)
                signing_key(create=True)  # fail before the build, not after
                found = _find(path, facts, quiet=True)
                if found is None:
                    held.enter_context(plan_files.locked(path))
                    found = _find(path, facts)
            except OSError as error:
                trouble, found = error, None
            if found is not None:
                return found
            content, notes = make()
            notes = as_json(notes)
            if trouble is None:
                trouble = self._keep(path, content, facts, notes)
        if trouble is not None:
            log.warning("the engine just built is used but not kept: %s", trouble)
        return Stored(content, facts, notes, built=True)

    def get(self, name: str, facts: Mapping[str, Any]) -> bytes | None:
        """Returns the bytes last stored by `put` under this name and these facts, or None.

        Raises:
            PlanRefused: folder or key does not belong to this user alone.
        """
        facts = as_json({"blob": name, "of": facts})
        try:
            if not os.path.lexists(self.folder):
                return None
            ensure_private_folder(self.folder)
            signing_key()
            found = _find(path_of(self.folder, facts, "blob"), facts)
        except OSError as error:
            log.warning("%s cannot be read: %s", name, error)
            return None
        return None if found is None else found.content

    def put(self, name: str, facts: Mapping[str, Any], content: bytes) -> None:
        """Stores bytes (a timing cache) under a name and facts, replacing earlier ones.

        Warns if they cannot be stored.

        Raises:
            PlanRefused: folder or key does not belong to this user alone.
        """
        facts = as_json({"blob": name, "of": facts})
        path = path_of(self.folder, facts, "blob")
        trouble: OSError | None
        try:
            ensure_private_folder(self.folder)
            with plan_files.locked(path):
                trouble = self._keep(path, content, facts, {})
        except OSError as error:
            trouble = error
        if trouble is not None:
            log.warning("%s is not kept: %s", name, trouble)

    def entries(self) -> list[Entry]:
        """Lists the files of the folder, last used first; each is read and verified.

        Raises:
            PlanRefused: folder or key does not belong to this user alone.
        """
        signing_key()
        return [plan_files.entry(group) for group in reversed(plan_files.groups(self.folder))]

    def clear(self, older_than: float | None = None) -> tuple[int, int]:
        """Deletes cached files, except those being built at this moment.

        Args:
            older_than: seconds since the last use; None for everything.

        Returns:
            Number of engines (and blobs) deleted, and the bytes freed.

        Raises:
            PlanRefused: the folder does not belong to this user alone.
        """
        newest = float("inf") if older_than is None else time.time() - older_than
        old = [group for group in plan_files.groups(self.folder) if group.last_use < newest]
        gone = [group for group in old if plan_files.drop(group)]
        return len(gone), sum(group.size for group in gone)

    def _keep(
        self, path: Path, content: bytes, facts: dict[str, Any], notes: dict[str, Any]
    ) -> OSError | None:
        """Writes a file whose lock is held, then evicts others; returns its OSError, or None."""
        try:
            files.remove_leftovers(self.folder, {path.name})
            write_plan(path, content, facts, notes)
        except OSError as error:
            return error
        try:
            taken = plan_files.evict(self.folder, self.limit)
        except (OSError, PlanRefused) as error:
            log.warning("no room was made in the cache: %s", error)
            return None
        if taken > self.limit:
            said = (limits.size_text(size) for size in (taken, self.limit))
            log.warning(
                "engines in %s take %s, the limit is %s; %s raises it",
                *(self.folder, *said, LIMIT_VARIABLE),
            )
        return None


def kernels_digest() -> str:
    """Returns the SHA-256 of the sources that determine what a compiled engine computes.

    These are all Python files of kernels/ (our GPU kernels) and of engines/, at any depth, except
    those that only serve engines which are not cached here (_COMPILE_NOTHING).
    """
    digest = hashlib.sha256()
    for package, skipped in (("kernels", set()), ("engines", _COMPILE_NOTHING)):
        for name, content in sorted(_sources(importlib.resources.files(f"ncsn_fast.{package}"))):
            parents = {name[:i] for i, letter in enumerate(name) if letter == "/"}
            if not skipped & {name, *parents}:
                digest.update(f"{package}/{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sources(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Yields the path below the folder, without ".py", and the content of each Python file."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".py"):
            yield prefix + entry.name.removesuffix(".py"), entry.read_bytes()


def _find(path: Path, facts: dict[str, Any], *, quiet: bool = False) -> Stored | None:
    """Reads the file with these facts, marking it as used; warns and returns None if refused."""
    try:
        stored = read_plan(path, facts)
    except FileNotFoundError:
        return None
    except PlanRefused as error:
        if not quiet:
            log.warning("%s %s; it is not used but made anew", error.path, error.reason)
        return None
    with contextlib.suppress(OSError):  # a read-only file system
        os.utime(path)
    return stored


__all__ = [
    "LIMIT",
    "LIMIT_VARIABLE",
    "Entry",
    "PlanCache",
    "PlanRefused",
    "Stored",
    "check_facts",
    "kernels_digest",
    "read_plan",
    "sign",
    "verify",
    "write_plan",
]
