"""LMDB databases whose values are encoded images, as those of LSUN (package `lmdb`).

The library trusts a database: one that is damaged on purpose can end the process (SECURITY.md).
"""

from __future__ import annotations

import logging
import os
import weakref
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ncsn_fast.data.decode import REMEDY, DataError, WarnOnce, printable
from ncsn_fast.data.formats.base import Format, no_split
from ncsn_fast.data.limits import IMAGE_BYTES
from ncsn_fast.data.transform import Transform

log = logging.getLogger(__name__)
_FILE = "data.mdb"


_environments: weakref.WeakValueDictionary[Path, Any] = weakref.WeakValueDictionary()


def _shared(folder: Path) -> Any:
    """Opens a database; the library opens one only once in a process."""
    import lmdb

    found = _environments.get(folder)
    try:
        if found is not None:
            found.info()
            return found
    except lmdb.Error:  # it is the parent's, and was closed
        pass
    opened = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
    _environments[folder] = opened
    return opened


class DatabaseImages:
    """Images of a database, in the order of their keys.

    A database holds one category and has no labels.
    """

    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __init__(self, folder: Path, transform: Transform) -> None:
        self.folder, self.transform, self.warn = folder, transform, WarnOnce()
        self._opened: tuple[int, Any] | None = None
        try:
            import lmdb
        except ImportError as error:
            raise DataError(
                f"{folder} is an LMDB database, which needs the `lmdb` package: "
                "pip install 'ncsn_fast[data]'"
            ) from error
        try:
            self._check_length()
            with self._environment().begin() as transaction:
                n = transaction.stat()["entries"]
                keys = transaction.cursor().iternext(keys=True, values=False)
                bar = tqdm(keys, "reading keys", total=n, unit="key", delay=2, leave=False)
                self.keys = list(bar)
        except lmdb.Error as error:
            raise DataError(
                f"cannot read {folder / _FILE}: {printable(str(error))}; is the download complete?"
            ) from error
        if not self.keys:
            raise DataError(f"{folder} is an LMDB database without entries")
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            self[index]  # before the training starts: other databases have keys and values too
        log.info("%s: %d images", folder, len(self))

    def _environment(self) -> Any:
        # One per process: a forked worker must not use its parent's, which it has to close.
        if self._opened is None or self._opened[0] != os.getpid():
            if self._opened is not None:
                self._opened[1].close()
            self._opened = (os.getpid(), _shared(self.folder.resolve()))
        return self._opened[1]

    def _check_length(self) -> None:
        """Raises DataError if the file is cut: a page beyond its end would end the process."""
        environment = self._environment()
        declared = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        size = (self.folder / _FILE).stat().st_size
        if size < declared:
            raise DataError(
                f"{self.folder / _FILE} has {size:,} bytes, and declares {declared:,}: download it "
                "again"
            )

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned, not forked
        return {**vars(self), "_opened": None}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Tensor:
        key = self.keys[index]
        name = f"{self.folder}[{printable(key.decode(errors='replace'))}]"
        with self._environment().begin(buffers=True) as transaction:
            value = transaction.get(key)
            if value is None:
                raise DataError(f"{name} is no longer there: restore it")
            IMAGE_BYTES.check(len(value), name, DataError)
            content = bytes(value)
        try:
            return self.transform(content, name, self.warn)
        except DataError as error:
            raise DataError(
                f"{str(error).removesuffix(REMEDY)}The values of the database must be encoded "
                "images, as LSUN's."
            ) from error


def recognises(path: Path) -> bool:
    """Whether a path is a folder that holds data.mdb, or that file."""
    return (path / _FILE).is_file() or (path.name == _FILE and path.is_file())


def open_database(path: Path, split: str, transform: Transform) -> DatabaseImages:
    """Opens the images of a database."""
    no_split(path, split)
    return DatabaseImages(path.parent if path.name == _FILE else path, transform)


FORMAT = Format("the folder of an LMDB database, as LSUN's (data.mdb)", recognises, open_database)
