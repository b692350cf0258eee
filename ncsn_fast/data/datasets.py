"""Data sets for training, editing and evaluation: the digits, and all formats (formats/).

Every source is an `Images`: indexable, returning uint8 tensors (C, H, W) of one size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ncsn_fast.data.damaged import REMOVE, damaged_images
from ncsn_fast.data.decode import DataError
from ncsn_fast.data.formats import FORMATS, recognise, split_of
from ncsn_fast.data.formats.base import Format, Images, MemoryImages, numbered
from ncsn_fast.data.formats.hub import HubImages
from ncsn_fast.data.transform import Transform

FORMS = (
    "digits, a folder or .zip of images, IDX files (MNIST), CIFAR's folder or .tar.gz, .npy, .npz, "
    "LMDB (LSUN) or hf:NAME (Hugging Face); SOURCE:SPLIT chooses a split"
)
HELD_OUT = 0.2  # fraction of the digits that is held out from training


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


def is_named(source: str) -> bool:
    """Whether a source is the digits or hf:NAME, and no path."""
    return source.startswith("hf:") or source.partition(":")[0] == "digits"


def open_images(
    source: str | Path,
    *,
    size: int,
    channels: int,
    centre_crop: int = 0,
    background: str = "white",
) -> Images:
    """Opens digits[:SPLIT], hf:NAME[:SPLIT] or PATH[:SPLIT] as a data set.

    The formats of paths are those of formats.FORMATS.

    Raises DataError if it cannot be opened, with the reason. `background` is the colour below
    transparent pixels (decode.decode).
    """
    text = str(source)
    if not text:
        raise DataError(f"no data given; pass --data with {FORMS}")
    name, _, split = text.partition(":")
    if name == "digits":
        if split not in ("", "train", "held-out"):
            raise DataError(f"the digits have no split {split!r}; digits:held-out is the other one")
        if channels != 1:
            raise DataError(
                "the digits are grey: take a network of 1 channel (train --channels 1), or other "
                "images"
            )
        held_out = split == "held-out"
        return MemoryImages(
            *digits("held-out" if held_out else "train", size), classes=numbered(10)
        )
    transform = Transform(size, channels, centre_crop, background)
    if text.startswith("hf:"):
        name, _, split = text.removeprefix("hf:").partition(":")
        return HubImages(name, split or "train", transform)
    path, split = split_of(text)
    return format_of(path).open(path, split, transform)


def format_of(path: Path) -> Format:
    """Returns the format of a file or folder; DataError if there is none such, or in no format."""
    if not path.exists():
        raise DataError(f"{path} does not exist; data is {FORMS}")
    known = recognise(path)
    if known is None:
        kinds = ", ".join(each.description for each in FORMATS)
        raise DataError(f"{path} {_found(path)}; data is one of: {kinds}")
    return known


def _found(path: Path) -> str:
    """Returns what an unknown path is, for a message."""
    if not path.is_file():
        return "is neither a file nor a folder"
    with contextlib.suppress(OSError), path.open("rb") as file:
        return f"begins with {file.read(8).hex(' ') or 'nothing'}, which is no known format"
    return "cannot be read"


def stack(images: Images, indices: Sequence[int] | None = None) -> Tensor:
    """Stacks all images, or those at `indices`, into one uint8 tensor (N, C, H, W).

    Raises:
        DataError: some cannot be read; all are counted, and the first are named.
    """
    if isinstance(images, MemoryImages):
        return images.images if indices is None else images.images[list(indices)]
    return torch.stack(list(read(images, range(len(images)) if indices is None else indices)))


def read(images: Images, indices: Sequence[int], remedy: str = REMOVE) -> Iterator[Tensor]:
    """Yields the images at `indices`; DataError at the end if some cannot be read, as in `stack`.

    Args:
        remedy: last sentence of its message.
    """
    damaged = []
    for index in indices:
        try:
            image = images[index]
        except DataError as error:
            damaged.append(error)
            continue
        yield image
    if damaged:
        raise damaged_images(damaged, len(indices), remedy)
