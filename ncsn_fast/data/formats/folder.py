"""Folders of image files, in any depth, with the classes of their subfolders or dataset.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ncsn_fast.data import json_file
from ncsn_fast.data.decode import DataError, WarnOnce
from ncsn_fast.data.formats.base import Format, no_split
from ncsn_fast.data.formats.labels import DATASET_JSON, find_labels
from ncsn_fast.data.limits import LABELS_BYTES
from ncsn_fast.data.listing import find_images, report_count
from ncsn_fast.data.transform import Transform


class FileImages:
    """Image files in a folder and its subfolders, sorted by name."""

    def __init__(self, folder: Path, transform: Transform) -> None:
        self.transform, self.warn = transform, WarnOnce()
        self.paths, skipped = find_images(folder)
        names = [path.relative_to(folder).as_posix() for path in self.paths]
        report_count(str(folder), names, skipped)
        self.labels, self.classes = find_labels(names, _read_labels(folder), str(folder))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        return self.transform(path, str(path), self.warn)


def _read_labels(folder: Path) -> dict[str, Any] | None:
    """Reads the dataset.json of a folder; None if there is none."""
    try:
        return json_file.read_json(folder / DATASET_JSON, limit=LABELS_BYTES)
    except FileNotFoundError:
        return None
    except json_file.JSONError as error:
        raise DataError(f"{error}; mend or remove it") from error


def open_folder(path: Path, split: str, transform: Transform) -> FileImages:
    """Opens the image files of a folder."""
    no_split(path, split)
    return FileImages(path, transform)


FORMAT = Format("a folder of images", Path.is_dir, open_folder)
