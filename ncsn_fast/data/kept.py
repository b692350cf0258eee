"""Data sets that are read once, before the work with them starts, and kept in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ncsn_fast.data.damaged import REMOVE, SKIP, damaged_images, names
from ncsn_fast.data.decode import DataError
from ncsn_fast.data.formats.base import KEPT_BYTES, Images, MemoryImages
from ncsn_fast.data.held_out import Subset
from ncsn_fast.data.limits import size_text
from ncsn_fast.data.loader import decoded

log = logging.getLogger(__name__)
AT_ONCE = 64  # images of a batch that is read


def keep(
    images: Images,
    shape: tuple[int, int, int],
    *,
    skip_damaged: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> Images:
    """Reads a data set into memory, if it takes at most KEPT_BYTES there.

    A larger one is returned as it is, to be decoded again in each epoch.

    Args:
        shape: of its images, (C, H, W).
        skip_damaged: leave images out that cannot be read, which a warning counts; a larger data
            set is then read once to find them.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        DataError: images cannot be read (without skip_damaged), or none can; all are counted, and
            the first are named.
    """
    if isinstance(images, MemoryImages):
        return images
    n, size = len(images), len(images) * shape[0] * shape[1] * shape[2]
    fits = size <= KEPT_BYTES
    if not fits:
        log.info(
            "the images are decoded again in each epoch: they have %s, and %s are kept in memory",
            size_text(size), size_text(KEPT_BYTES),
        )  # fmt: skip
        if not skip_damaged:
            return images
    memory = torch.empty(n if fits else 0, *shape, dtype=torch.uint8)
    good: list[int] = []
    damaged: list[DataError] = []
    for indices, batch, errors in _read(images, range(n), workers, progress):
        if fits and len(batch):
            memory[len(good) : len(good) + len(batch)] = batch
        good += [index for place, index in enumerate(indices) if place not in errors]
        damaged += errors.values()
    if damaged and (not skip_damaged or not good):
        raise damaged_images(damaged, n, SKIP if good else REMOVE)
    if damaged:
        log.warning("%d of %d images are damaged and left out: %s", len(damaged), n, names(damaged))
    if not fits:
        return Subset(images, good) if damaged else images
    labels = None if images.labels is None else images.labels[good]
    return MemoryImages(memory[: len(good)], labels, images.classes)


def _read(
    images: Images, indices: Sequence[int], workers: int, progress: bool
) -> Iterator[tuple[list[int], Tensor, dict[int, DataError]]]:
    """Yields batches: their indices, the images that can be read, and errors by place."""
    batches = [list(indices[i : i + AT_ONCE]) for i in range(0, len(indices), AT_ONCE)]
    with tqdm(
        total=len(indices), desc="reading images", unit="image", delay=1, disable=not progress
    ) as bar:
        for batch, found in zip(batches, decoded(images, batches, workers), strict=True):
            yield (batch, *found)
            bar.update(len(batch))
