"""Data sets for training and editing: digits, folders, zip files, Hugging Face data sets.

Every source is an `Images`: indexable, returning uint8 tensors (C, H, W) of one size.
"""

from __future__ import annotations

import dataclasses
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
HELD_OUT = 0.2  # fraction of the digits that is held out from training


class DataError(ValueError):
    """Error for images that cannot be read; the message names the image and the remedy."""


class Images(Protocol):
    """Indexable data set of images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Transform:
    """Preprocessing of the published code: PIL image -> uint8 (channels, size, size).

    Centre crop (smaller images are left unchanged), resize of the shorter side to `size`
    (bilinear), centre crop to a square.
    """

    size: int
    channels: int
    centre_crop: int = 0

    def __call__(self, image: Image.Image) -> Tensor:
        image = _eight_bit(image).convert("RGB" if self.channels == 3 else "L")
        if self.centre_crop:
            width, height = (min(side, self.centre_crop) for side in image.size)
            image = _crop(image, width, height)
        short = min(image.size)
        if short != self.size:
            width, height = (side * self.size // short for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = _crop(image, self.size, self.size)
        array = np.asarray(image, dtype=np.uint8).reshape(self.size, self.size, self.channels)
        return torch.from_numpy(array.transpose(2, 0, 1).copy())


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits, where Pillow would clip it; rejects floating point."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 bits")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype("u1"))
    return image


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


class MemoryImages:
    """Data set held in one uint8 tensor (N, C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class FileImages:
    """Image files in a folder and its subfolders, sorted by name."""

    def __init__(self, folder: Path, transform: Transform) -> None:
        self.transform = transform
        self.paths = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
        )
        if not self.paths:
            raise DataError(
                f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}, in any depth)"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return _decode(
            lambda: Image.open(self.paths[index]), self.transform, str(self.paths[index])
        )


class ZipImages:
    """Image files in a zip archive and its subfolders."""

    def __init__(self, path: Path, transform: Transform) -> None:
        self.path, self.transform = path, transform
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        try:
            names = self._open().namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"cannot read {path} as a zip archive ({error}); is the download complete?"
            ) from error
        self.names = sorted(
            n for n in names if Path(n).suffix.lower() in SUFFIXES and not n.startswith("__MACOSX")
        )
        if not self.names:
            raise DataError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))}, in any depth)")

    def _open(self) -> zipfile.ZipFile:
        # One file handle per process: a forked worker must not share its parent's file position.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1]

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned, not forked
        return {**vars(self), "_archive": None}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        name = self.names[index]

        def read() -> Image.Image:
            return Image.open(io.BytesIO(self._open().read(name)))

        return _decode(read, self.transform, f"{self.path}:{name}")


class HubImages:
    """Image column of a Hugging Face data set (`datasets`), by name or local path."""

    def __init__(self, name: str, split: str, transform: Transform) -> None:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                "hf: data needs the `datasets` package: pip install 'ncsn_fast[data]'"
            ) from error
        try:
            self.rows: Any = datasets.load_dataset(name, split=split)
        except (
            Exception
        ) as error:  # the library raises a dozen kinds; each becomes one line with its cause
            raise DataError(
                f"cannot load hf:{name} (split {split}): {type(error).__name__}: {error}"
            ) from error
        columns = [k for k, kind in self.rows.features.items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise DataError(
                f"hf:{name} has no image column; its columns are {', '.join(self.rows.features)}"
            )
        self.name, self.column, self.transform = name, columns[0], transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        where = f"hf:{self.name}[{index}]"
        return _decode(lambda: self.rows[int(index)][self.column], self.transform, where)


def read_image(path: Path, transform: Transform) -> Tensor:
    """Reads an image file as uint8 (C, S, S)."""
    return _decode(lambda: Image.open(path), transform, str(path))


def _decode(read: Callable[[], Image.Image], transform: Transform, where: str) -> Tensor:
    try:
        return transform(read())
    except Exception as error:  # damaged files make the decoders raise nearly anything
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot decode image {where}: {reason}. Remove or replace it.") from error


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


def open_images(source: str | Path, *, size: int, channels: int, centre_crop: int = 0) -> Images:
    """Opens `digits`, a folder, a zip file or `hf:NAME[:SPLIT]` as a data set.

    Raises DataError if it cannot be opened, with the reason.
    """
    text = str(source)
    if not text:
        raise DataError(
            "no data given; pass --data FOLDER, --data FILE.zip, --data hf:NAME or --data digits"
        )
    if text == "digits":
        if channels != 1:
            raise DataError("the digits are grey; use --channels 1")
        return MemoryImages(digits("train", size)[0])
    transform = Transform(size, channels, centre_crop)
    if text.startswith("hf:"):
        name, _, split = text.removeprefix("hf:").partition(":")
        return HubImages(name, split or "train", transform)
    path = Path(source).expanduser()
    if path.is_dir():
        return FileImages(path, transform)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipImages(path, transform)
    if path.exists():
        raise DataError(f"{path} is neither a folder nor a .zip file")
    raise DataError(
        f"{path} does not exist; data is digits, a folder, a .zip file or hf:NAME[:SPLIT]"
    )


def stack(images: Images, indices: list[int] | None = None) -> Tensor:
    """Stacks all images, or those at `indices`, into one uint8 tensor (N, C, H, W)."""
    if isinstance(images, MemoryImages):
        return images.images if indices is None else images.images[indices]
    return torch.stack([images[i] for i in (range(len(images)) if indices is None else indices)])
