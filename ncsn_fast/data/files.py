"""Atomic file writes: a file holds either its old or its new content, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import BinaryIO

from ncsn_fast.data.limits import Limit

try:
    import fcntl
except ModuleNotFoundError as error:
    raise ImportError(
        "ncsn_fast needs a POSIX system, such as Linux; on Windows, use the Subsystem for Linux"
    ) from error

_SUFFIX = ".tmp"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]+\.tmp")
# Errors of file systems without hard links (FAT, some network and cloud mounts).
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# Errors of folders that cannot be flushed: some file systems, and folders that may not be read.
_NO_FLUSH = (errno.EINVAL, errno.EBADF, errno.EACCES, *_NO_LINKS)


class WrittenError(OSError):
    """Error that comes after a file has been changed; the message says which, and what is left."""


def open_regular(path: Path, limit: Limit) -> BinaryIO:
    """Opens a file for reading bytes.

    A pipe or device may keep its reader waiting for ever, or never end.

    Raises:
        OSError: it is no regular file, or larger than the limit.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
            raise OSError(f"{path} is {kind}, not a file")
        limit.check(found.st_size, str(path), OSError)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@contextlib.contextmanager
def atomic_write(path: Path, *, overwrite: bool = True, mode: int | None = None) -> Iterator[Path]:
    """Yields a temporary path; on success flushes it to disk and renames it to `path`.

    If the process is killed, the old file remains, or none; the next call for this path removes the
    temporary file. OSError (for example a full disk) means that nothing changed, unless it is a
    WrittenError. With overwrite=False an existing file is kept, even if another process creates it
    meanwhile: of several concurrent writers exactly one succeeds. `mode` holds from the file's
    creation on; None uses the umask.
    """
    with _temporaries((path,), mode) as (temporary,):
        yield temporary
        _flush(temporary, mode)
        if overwrite:
            os.replace(temporary, path)
        else:
            _put_once(temporary, path, 0o666 if mode is None else mode)
        _fsync_folder(path.parent)


@contextlib.contextmanager
def atomic_write_all(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yields a temporary path for each of several files that belong together.

    All are flushed to disk before the first is renamed, in the order of `paths`. A kill between two
    renames leaves new files beside old ones: the last must say which others it belongs to.
    """
    with _temporaries(paths) as temporaries:
        for path in paths:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield temporaries
        for temporary in temporaries:
            _flush(temporary, None)
        for k, (temporary, path) in enumerate(zip(temporaries, paths, strict=True)):
            try:
                os.replace(temporary, path)
            except OSError as error:
                if k == 0:
                    raise
                raise WrittenError(
                    f"{' and '.join(map(str, paths[:k]))} was written, but {path} could not be: "
                    f"{error.strerror or error}. Mend that, then repeat the command."
                ) from error
        for folder in {path.parent for path in paths}:
            _fsync_folder(folder)


@contextlib.contextmanager
def _temporaries(paths: tuple[Path, ...], mode: int | None = None) -> Iterator[tuple[Path, ...]]:
    """Creates a temporary file beside each path, locked while this process lives."""
    made: list[tuple[int, Path]] = []
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, {path.name})
            made.append(_temporary(path, mode))
        yield tuple(temporary for _, temporary in made)
    except WrittenError:
        raise
    except OSError as error:
        raise OSError(
            f"cannot write {' and '.join(map(str, paths))}: {error.strerror or error}. Nothing was "
            "changed there; make room or choose another place, then repeat the command."
        ) from error
    finally:
        for descriptor, temporary in made:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


def _temporary(path: Path, mode: int | None) -> tuple[int, Path]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        name = path.parent / f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}"
        try:
            # The system applies the umask: reading it would set it, for all threads.
            descriptor = os.open(name, flags, 0o666 if mode is None else mode)
        except FileExistsError:
            continue
        if mode is not None:
            os.fchmod(descriptor, mode)  # whatever the umask takes away
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)  # remove_leftovers of another process was faster than the lock


def _flush(temporary: Path, mode: int | None) -> None:
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    if mode is not None:
        os.chmod(temporary, mode)


def remove_leftovers(folder: Path, names: Container[str] | None = None) -> None:
    """Deletes temporary files that atomic_write left in a folder when its process was killed.

    Files that a living process is writing are locked, and stay.

    Args:
        names: delete only temporary files for these file names.
    """
    try:
        with os.scandir(folder) as entries:
            found = [(m["name"], e.path) for e in entries if (m := _TEMPORARY.fullmatch(e.name))]
    except FileNotFoundError:
        return
    for name, path in found:
        if names is None or name in names:
            with contextlib.suppress(OSError):  # somebody else's, or just renamed
                _remove_unlocked(path)


def _remove_unlocked(path: str) -> None:
    # Locks of NFS are for descriptors that can write.
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    finally:
        os.close(descriptor)


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


def _fsync_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk, where its file system and its permissions allow that.

    Raises:
        WrittenError: the disk fails.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise WrittenError(
                f"the file was written, but its name in {folder} could not be flushed to disk "
                f"({error.strerror or error}): it is lost if the machine stops now. Check the "
                "disk, then repeat the command."
            ) from error


def cache_folder() -> Path:
    """Returns the cache folder: $XDG_CACHE_HOME/ncsn_fast, or ~/.cache/ncsn_fast.

    It holds caches and measurements.
    """
    return user_folder("XDG_CACHE_HOME", ".cache") / "ncsn_fast"


def user_folder(variable: str, usual: str) -> Path:
    """Returns the folder that an environment variable names, else `usual` in the home directory.

    Users without a home (containers that run under any user number) get one in the system's
    temporary folder, of mode 0700.

    Raises:
        OSError: that folder exists, and is not theirs alone.
    """
    if given := os.environ.get(variable):
        return Path(given)
    home = os.path.expanduser("~")  # as it is, where nobody knows
    return (Path(home) if os.access(home, os.X_OK) else _temporary_home(variable)) / usual


def _temporary_home(variable: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"ncsn_fast-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(f"{folder} is not this user's alone; set HOME or {variable} to a folder")
    return folder
