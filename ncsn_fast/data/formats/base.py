"""Interface of the formats of data sets, and data sets in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn_fast.data.decode import DataError
from ncsn_fast.data.transform import Transform

KEPT_BYTES = 2**31  # of a data set of the run's size that is kept in memory, once decoded
MOST_CLASSES = 2**20  # a larger number is no class, but something else


class Images(Protocol):
    """Indexable data set of images: uint8 tensors (C, H, W) of one size.

    Attributes:
        labels: classes (N,), int64, or None where the format has none.
        classes: name of each class; its number where the format names none.
    """

    labels: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


class MemoryImages:
    """Data set held in one uint8 tensor (N, C, H, W)."""

    def __init__(
        self, images: Tensor, labels: Tensor | None = None, classes: tuple[str, ...] = ()
    ) -> None:
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@dataclasses.dataclass(frozen=True)
class Format:
    """Reader of a format.

    Attributes:
        description: files and folders that it takes, for messages.
        recognises: whether a path is of this format, from its name and first bytes.
        open: opens (path, split, transform); a split of "" is the default. Raises DataError, before
            the first image is asked for where the cause can be known.
    """

    description: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, str, Transform], Images]


def numbered(n: int) -> tuple[str, ...]:
    """Returns the names of n classes that have none: "0", "1", ..."""
    return tuple(map(str, range(n)))


def no_split(path: Path, split: str) -> None:
    """Raises DataError if a split is asked of a format that has none."""
    if split:
        raise DataError(f"{path} has no split {split!r}: leave :{split} out, or give its own path")


def check_labels(labels: NDArray[Any], where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Returns class numbers (N,) as int64, and a name for each class up to the largest.

    Raises:
        DataError: they are no class numbers.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{where}: labels must be integers (N,); got {labels.dtype} {labels.shape}")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= MOST_CLASSES:
        raise DataError(
            f"{where}: labels must be class numbers from 0 to {MOST_CLASSES - 1}; got {low} to "
            f"{high}"
        )
    return torch.from_numpy(labels.astype(np.int64)), numbered(high + 1)
