"""Data sets for training and editing: digits, folders, zip files, IDX, Hugging Face data sets.

Every source is an `Images`: indexable, returning uint8 tensors (C, H, W) of one size.
"""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ncsn_fast.data.decode import REMEDY, SUFFIXES, DataError, WarnOnce, printable
from ncsn_fast.data.formats import FORMATS, recognise, split_of
from ncsn_fast.data.formats.base import Images, MemoryImages, numbered
from ncsn_fast.data.limits import IMAGE_BYTES
from ncsn_fast.data.listing import Skipped, find_images, find_zip_images
from ncsn_fast.data.transform import Transform

log = logging.getLogger(__name__)
HELD_OUT = 0.2  # fraction of the digits that is held out from training
_CHUNK = 4096  # bytes of a zip entry read at once: bzip2 expands a kilobyte to megabytes


class FileImages:
    """Image files in a folder and its subfolders, sorted by name."""

    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __init__(self, folder: Path, transform: Transform) -> None:
        self.transform, self.warn = transform, WarnOnce()
        self.paths, skipped = find_images(folder)
        _report_count(str(folder), len(self.paths), skipped)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        return self.transform(path, str(path), self.warn)


class ZipImages:
    """Image files in a zip archive and its subfolders."""

    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __init__(self, path: Path, transform: Transform) -> None:
        self.path, self.transform, self.warn = path, transform, WarnOnce()
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        try:
            self.entries, skipped = find_zip_images(self._open())
        except Exception as error:  # zipfile raises many kinds for damaged archives
            raise DataError(
                f"cannot read {path} as a zip archive ({printable(str(error))}); is the download "
                "complete?"
            ) from error
        _report_count(str(path), len(self.entries), skipped)

    def _open(self) -> zipfile.ZipFile:
        # One file handle per process: a forked worker must not share its parent's file position.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1]

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned, not forked
        return {**vars(self), "_archive": None}

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


class HubImages:
    """Image column of a Hugging Face data set (`datasets`), by name or local path."""

    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __init__(self, name: str, split: str, transform: Transform) -> None:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                "hf: data needs the `datasets` package: pip install 'ncsn_fast[data]'"
            ) from error
        try:
            rows: Any = datasets.load_dataset(name, split=split)
        except (
            Exception
        ) as error:  # the library raises a dozen kinds; each becomes one line with its cause
            raise DataError(
                f"cannot load hf:{name} (split {split}): {type(error).__name__}: {error}"
            ) from error
        columns = [k for k, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise DataError(
                f"hf:{name} has no image column; its columns are {', '.join(rows.features)}"
            )
        self.name, self.column, self.transform = name, columns[0], transform
        self.warn = WarnOnce()
        # Bytes, because the library would decode images without limits.
        self.rows = rows.select_columns(self.column).cast_column(
            self.column, datasets.Image(decode=False)
        )
        self._decode = datasets.Image().decode_example

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        where = f"hf:{self.name}[{index}]"
        try:
            row = self.rows[int(index)][self.column]
            path = Path(row["path"] or "")
            # Paths inside archives and remote ones are opened by the library.
            source = row["bytes"] or (path if path.is_file() else self._decode(row))
        except Exception as error:  # a missing image, a network error: any kind
            reason = printable(str(error) or type(error).__name__)
            raise DataError(f"cannot read {where}: {reason}. {REMEDY}") from error
        return self.transform(source, where, self.warn)


def _report_count(source: str, n: int, skipped: Skipped) -> None:
    """Logs how many images were found and skipped; raises DataError if there are none."""
    if n == 0:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(f"{source} holds no images ({kinds}, in any depth); skipped: {skipped}")
    log.info("%s: %d images; skipped: %s", source, n, skipped)


def read_image(path: Path, transform: Transform) -> Tensor:
    """Reads an image file as uint8 (C, S, S)."""
    return transform(path, str(path))


def digits(split: Literal["train", "held-out"] = "train", size: int = 16) -> tuple[Tensor, Tensor]:
    """Returns scikit-learn's UCI handwritten digits: uint8 (N, 1, size, size), and labels (N,).

    1797 scans of 8x8 pixels, resized bicubically. A fixed fifth, stratified by class, is held out.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    train, held_out = train_test_split(
        np.arange(len(scans)), test_size=HELD_OUT, random_state=0, stratify=labels
    )
    chosen = np.sort(train if split == "train" else held_out)
    grey = np.round(scans[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    resized = [
        np.asarray(Image.fromarray(g).resize((size, size), Image.Resampling.BICUBIC)) for g in grey
    ]
    return torch.from_numpy(np.stack(resized)[:, None]), torch.from_numpy(labels[chosen])


def open_images(
    source: str | Path,
    *,
    size: int,
    channels: int,
    centre_crop: int = 0,
    background: str = "white",
) -> Images:
    """Opens `digits`, a folder, a zip or IDX file, or `hf:NAME[:SPLIT]` as a data set.

    A path of IDX files may end in `:test`, for that split (formats/).

    Raises DataError if it cannot be opened, with the reason. `background` is the colour below
    transparent pixels (decode.decode).
    """
    text = str(source)
    if not text:
        raise DataError(
            "no data given; pass --data FOLDER, --data FILE.zip, --data hf:NAME or --data digits"
        )
    if text == "digits":
        if channels != 1:
            raise DataError(
                "the digits are grey: take a network of 1 channel (train --channels 1), or other "
                "images"
            )
        return MemoryImages(*digits("train", size), classes=numbered(10))
    transform = Transform(size, channels, centre_crop, background)
    if text.startswith("hf:"):
        name, _, split = text.removeprefix("hf:").partition(":")
        return HubImages(name, split or "train", transform)
    path, split = split_of(text)
    if path.exists() and (known := recognise(path)):
        return known.open(path, split, transform)
    if split and path.exists():
        raise DataError(f"{path} has no splits; leave :{split} out")
    if path.is_dir():
        return FileImages(path, transform)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipImages(path, transform)
    if path.exists():
        kinds = "; ".join(each.description for each in FORMATS)
        raise DataError(f"{path} is neither a folder nor a .zip file nor one of: {kinds}")
    raise DataError(
        f"{path} does not exist; data is digits, a folder, a .zip or IDX file or hf:NAME[:SPLIT]"
    )


def stack(images: Images, indices: list[int] | None = None) -> Tensor:
    """Stacks all images, or those at `indices`, into one uint8 tensor (N, C, H, W)."""
    if isinstance(images, MemoryImages):
        return images.images if indices is None else images.images[indices]
    return torch.stack([images[i] for i in (range(len(images)) if indices is None else indices)])
