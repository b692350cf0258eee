"""Images that are held out from training."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsn_fast.data.datasets import stack
from ncsn_fast.data.decode import DataError
from ncsn_fast.data.formats.base import Images, MemoryImages


class Subset:
    """Images of a data set at some indices, with their labels."""

    def __init__(self, images: Images, indices: list[int]) -> None:
        self.images, self.indices = images, indices
        self.labels = None if images.labels is None else images.labels[indices]
        self.classes = images.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[self.indices[index]]


def hold_out(images: Images, n: int, seed: int) -> tuple[Images, MemoryImages]:
    """Splits n images off, chosen at random; both parts keep their order.

    Returns:
        the others, and the n, in memory.

    Raises:
        DataError: none would be left.
    """
    if n == 0:
        return images, MemoryImages(torch.empty(0, dtype=torch.uint8))
    if n >= len(images):
        raise DataError(f"cannot hold out {n} of {len(images)} images: none would be left to train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen, rest = (sorted(part.tolist()) for part in (order[:n], order[n:]))
    return _part(images, rest), _in_memory(images, chosen)


def _part(images: Images, indices: list[int]) -> Images:
    whole = isinstance(images, MemoryImages)
    return _in_memory(images, indices) if whole else Subset(images, indices)


def _in_memory(images: Images, indices: list[int]) -> MemoryImages:
    labels = None if images.labels is None else images.labels[indices]
    return MemoryImages(stack(images, indices), labels, images.classes)
