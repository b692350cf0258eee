"""Data sets for training and editing: digits, folders, zip files, Hugging Face data sets.

Every source is an `Images`: indexable, returning uint8 tensors (C, H, W) of one size.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import zipfile
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ncsn_fast.data.decode import (
    REMEDY,
    SUFFIXES,
    DataError,
    WarnOnce,
    check_channels,
    decode,
    parse_colour,
    pixels,
    printable,
)
from ncsn_fast.data.limits import IMAGE_BYTES, PIXELS
from ncsn_fast.data.listing import Skipped, find_images, find_zip_images

log = logging.getLogger(__name__)
HELD_OUT = 0.2  # fraction of the digits that is held out from training
_CHUNK = 4096  # bytes of a zip entry read at once: bzip2 expands a kilobyte to megabytes
_LONGEST = 16  # largest ratio of the sides that is resized before the crop


class Images(Protocol):
    """Indexable data set of images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Transform:
    """Preprocessing of the published code: image -> uint8 (channels, size, size).

    `decode` has the rules for modes and colours, `centre_square` for crop and size.
    """

    size: int
    channels: int
    centre_crop: int = 0
    background: str = "white"

    def __post_init__(self) -> None:
        check_channels(self.channels)
        parse_colour(self.background)
        PIXELS.check(self.size**2, f"an image size of {self.size}", DataError)

    def __call__(
        self,
        source: Path | bytes | Image.Image,
        name: str = "the image",
        warn: WarnOnce | None = None,
    ) -> Tensor:
        """Decodes, crops and resizes one image.

        Raises:
            DataError: it cannot be decoded; the message contains its name.
        """
        decoded = decode(
            source,
            self.channels,
            name=name,
            warn=warn or WarnOnce(),
            background=self.background,
        )
        return pixels(centre_square(decoded, self.size, self.centre_crop))


def centre_square(
    image: Image.Image,
    size: int,
    centre_crop: int = 0,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
    """Crops and resizes an image to size x size pixels.

    Centre crop (smaller images are left unchanged), resize of the shorter side to `size`, centre
    crop to a square. Of an image more than 16 times as long as wide only the middle is resized.
    """
    if centre_crop:
        image = _crop(image, *(min(side, centre_crop) for side in image.size))
    short = min(image.size)
    image = _crop(image, *(min(side, _LONGEST * short) for side in image.size))
    if short != size:
        width, height = (side * size // short for side in image.size)
        image = image.resize((width, height), resample)
    return _crop(image, size, size)


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
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


class Subset:
    """Images of a data set at some indices."""

    def __init__(self, images: Images, indices: list[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[self.indices[index]]


class FileImages:
    """Image files in a folder and its subfolders, sorted by name."""

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
    """Opens `digits`, a folder, a zip file or `hf:NAME[:SPLIT]` as a data set.

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
        return MemoryImages(digits("train", size)[0])
    transform = Transform(size, channels, centre_crop, background)
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
    chosen = range(len(images)) if indices is None else indices
    return torch.stack([images[i] for i in chosen]) if len(chosen) else torch.empty(0)


def hold_out(images: Images, n: int, seed: int) -> tuple[Images, Tensor]:
    """Splits n images off, chosen at random; both parts keep their order.

    Returns:
        the others, and the n as one uint8 tensor (n, C, H, W).

    Raises:
        DataError: none would be left.
    """
    if n == 0:
        return images, stack(images, [])
    if n >= len(images):
        raise DataError(f"cannot hold out {n} of {len(images)} images: none would be left to train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen, rest = (sorted(part.tolist()) for part in (order[:n], order[n:]))
    held_out = stack(images, chosen)
    if isinstance(images, MemoryImages):
        return MemoryImages(images.images[rest]), held_out
    return Subset(images, rest), held_out
