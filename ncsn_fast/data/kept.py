"""Data sets that are kept in memory as they are decoded: each image is decoded once in a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ncsn_fast.data.formats.base import KEPT_BYTES, Images, MemoryImages
from ncsn_fast.data.limits import size_text

log = logging.getLogger(__name__)


class KeptImages:
    """Data set that keeps what it has decoded.

    Attributes:
        source: the data set that decodes.
        images: uint8 (N, C, H, W); rows that are not `known` are undefined.
        known: (N,) bool.
    """

    def __init__(self, source: Images, shape: tuple[int, int, int]) -> None:
        self.source, self.labels, self.classes = source, source.labels, source.classes
        self.images = torch.empty(len(source), *shape, dtype=torch.uint8)  # takes memory as filled
        self.known = torch.zeros(len(source), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        if not bool(self.known[index]):
            self.put([index], self.source[index][None])
        return self.images[index]

    def put(self, indices: Sequence[int], images: Tensor) -> None:
        """Keeps decoded images (n, C, H, W)."""
        where = torch.tensor(indices)
        self.images[where], self.known[where] = images, True


def keep(images: Images, shape: tuple[int, int, int]) -> Images:
    """Returns a data set that decodes each image once, if all of them fit into KEPT_BYTES.

    Args:
        shape: of its images, (C, H, W).
    """
    if isinstance(images, MemoryImages):
        return images
    size = len(images) * shape[0] * shape[1] * shape[2]
    if size > KEPT_BYTES:
        log.info(
            "the images are decoded again in each epoch: they have %s, and %s are kept in memory",
            size_text(size), size_text(KEPT_BYTES),
        )  # fmt: skip
        return images
    log.info("the images are kept in memory once they are decoded (%s)", size_text(size))
    return KeptImages(images, shape)
