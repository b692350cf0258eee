"""Files that are either the old one or the new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path

_SUFFIX = ".tmp"
# What file systems without hard links answer (FAT, some network and cloud mounts).
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def atomic_write(path: Path, *, overwrite: bool = True, mode: int | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed.

    A kill at any moment leaves the old file, or none. OSError (a full disk, say) says that nothing
    changed. With overwrite=False a file that is there, or that another process makes meanwhile,
    stays: of many that write at once, exactly one does. `mode` is the file's from its first moment
    on; None is what the umask leaves.
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


def remove_leftovers(folder: Path, names: Container[str] | None = None) -> None:
    """Deletes what atomic_write left in a folder when its process was killed.

    Args:
        names: only what was to become one of these files; for folders in which other processes are
            writing theirs.
    """
    for leftover in folder.glob(f".*{_SUFFIX}"):
        if names is None or leftover.name[1:].rsplit(".", 2)[0] in names:
            leftover.unlink(missing_ok=True)


def _put_once(temporary: Path, path: Path, mode: int) -> None:
    """Gives a finished file its name, unless a file of that name is there."""
    try:
        os.link(temporary, path)  # unlike a rename, refuses a name that is taken
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Still one writer only, but a kill just now can leave half a file.
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
    """Folder of caches and measurements: ncsn_fast below $XDG_CACHE_HOME, or below ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ncsn_fast"
