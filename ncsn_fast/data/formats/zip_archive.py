"""Zip archives of image files, in any depth, with the classes of their folders or dataset.json."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor

from ncsn_fast.data import json_file
from ncsn_fast.data.decode import REMEDY, DataError, WarnOnce, printable
from ncsn_fast.data.formats.base import Format, no_split
from ncsn_fast.data.formats.labels import DATASET_JSON, find_labels
from ncsn_fast.data.limits import IMAGE_BYTES, LABELS_BYTES
from ncsn_fast.data.listing import find_zip_images, report_count
from ncsn_fast.data.transform import Transform

_CHUNK = 4096  # bytes of an entry read at once: bzip2 expands a kilobyte to megabytes


class ZipImages:
    """Image files in a zip archive and its subfolders."""

    def __init__(self, path: Path, transform: Transform) -> None:
        self.path, self.transform, self.warn = path, transform, WarnOnce()
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        try:
            self.entries, skipped = find_zip_images(self._open())
            described = self._read_labels()
        except DataError:
            raise
        except Exception as error:  # zipfile raises many kinds for damaged archives
            raise DataError(
                f"cannot read {path} as a zip archive ({printable(str(error))}); is the download "
                "complete?"
            ) from error
        names = [entry.filename.replace("\\", "/") for entry in self.entries]
        report_count(str(path), names, skipped)
        self.labels, self.classes = find_labels(names, described, str(path))

    def _open(self) -> zipfile.ZipFile:
        # One file handle per process: a forked worker must not share its parent's file position.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1]

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned, not forked
        return {**vars(self), "_archive": None}

    def _read_labels(self) -> dict[str, Any] | None:
        """Reads the dataset.json at the top of the archive; None if there is none."""
        archive, where = self._open(), f"{printable(str(self.path))}!{DATASET_JSON}"
        if DATASET_JSON not in archive.namelist():
            return None
        entry = archive.getinfo(DATASET_JSON)
        LABELS_BYTES.check(entry.file_size, where, DataError)
        try:
            return json_file.parse_json(self._read(entry).decode(), where)
        except (UnicodeDecodeError, json_file.JSONError) as error:
            raise DataError(f"cannot read {where}: {error}; mend or remove it") from error

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Tensor:
        entry = self.entries[index]
        name = f"{self.path}!{entry.filename}"
        IMAGE_BYTES.check(entry.file_size, printable(name), DataError)
        try:
            content = self._read(entry)
        except Exception as error:  # damaged, encrypted, unknown compression: any kind
            reason = printable(str(error) or type(error).__name__)
            raise DataError(f"cannot read {printable(name)}: {reason}. {REMEDY}") from error
        return self.transform(content, name, self.warn)

    def _read(self, entry: zipfile.ZipInfo) -> bytes:
        """Reads an entry, at most as many bytes as it declares."""
        with self._open().open(entry) as file:
            return b"".join(iter(lambda: file.read(_CHUNK), b""))


def recognises(path: Path) -> bool:
    """Whether a path is a file with the suffix .zip."""
    return path.suffix.lower() == ".zip" and path.is_file()


def open_zip(path: Path, split: str, transform: Transform) -> ZipImages:
    """Opens the image files of an archive."""
    no_split(path, split)
    return ZipImages(path, transform)


FORMAT = Format("a .zip file of images", recognises, open_zip)
