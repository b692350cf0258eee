"""Atomic file writes: a file holds either its old or its new content, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

_SUFFIX = ".tmp"
# Errors of file systems without hard links (FAT, some network and cloud mounts).
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def atomic_write(path: Path, *, overwrite: bool = True, mode: int | None = None) -> Iterator[Path]:
    """Yields a temporary path; on success flushes it to disk and renames it to `path`.

    If the process is killed, the old file remains, or none. OSError (for example a full disk) means
    that nothing changed. With overwrite=False an existing file is kept, even if another process
    creates it meanwhile: of several concurrent writers exactly one succeeds. `mode` holds from the
    file's creation on; None uses the umask.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask() if mode is None else mode)
        if overwrite:
            os.replace(temporary, path)
        else:
            _put_once(temporary, path, 0o666 if mode is None else mode)
        _fsync_folder(path.parent)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}. Nothing was changed there; "
            "make room or choose another place, then repeat the command."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def read_json(path: Path, *, most_bytes: int) -> Any:
    """Returns the value in a small JSON file; None if there is none, or it is damaged or larger."""
    try:
        with path.open("rb") as file:
            text = file.read(most_bytes + 1)
        return json.loads(text) if len(text) <= most_bytes else None
    except (OSError, ValueError, RecursionError):
        return None


def remove_leftovers(folder: Path, names: Container[str] | None = None) -> None:
    """Deletes temporary files that atomic_write left in a folder when its process was killed.

    Args:
        names: delete only temporary files for these file names; needed in folders that other
            processes are writing to.
    """
    for leftover in folder.glob(f".*{_SUFFIX}"):
        if names is None or leftover.name[1:].rsplit(".", 2)[0] in names:
            leftover.unlink(missing_ok=True)


def _put_once(temporary: Path, path: Path, mode: int) -> None:
    """Renames a finished file to `path`, unless `path` exists."""
    try:
        os.link(temporary, path)  # unlike a rename, fails if the name exists
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Still exactly one writer, but a kill at this point can leave a partial file.
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "wb") as file:
                file.write(temporary.read_bytes())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Returns the cache folder: $XDG_CACHE_HOME/ncsn_fast, or ~/.cache/ncsn_fast.

    It holds caches and measurements.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ncsn_fast"
