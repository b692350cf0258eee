"""Training batches: their order, a pure function of seed and step, and their loading."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.data.decode import DataError
from ncsn_fast.data.formats.base import Images, MemoryImages


def batch_indices(
    n: int, batch_size: int, *, seed: int, start_step: int = 0
) -> Iterator[list[int]]:
    """Yields endless batches of indices from permutations, a pure function of (seed, step)."""
    per_epoch = max(1, n // batch_size)
    step = start_step
    while True:
        epoch = step // per_epoch
        order = torch.randperm(
            n, generator=torch.Generator().manual_seed(seed + 1_000_003 * epoch)
        ).tolist()
        for i in range(step % per_epoch, per_epoch):
            yield order[i * batch_size : (i + 1) * batch_size]
            step += 1


def batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    share: slice = slice(None),
) -> Iterator[Tensor]:
    """Yields endless uint8 batches (B, C, H, W) from `start_step`.

    `workers` processes decode them. Of each batch only the places in `share` are read.
    """
    numbered = _numbered(images, batch_size, seed, start_step, workers, share)
    return (batch for batch, _ in numbered)


def labelled_batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    share: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the images of `batches`, each batch with its labels (B,) int64.

    Raises:
        DataError: the data set has no labels.
    """
    labels = labels_of(images)
    numbered = _numbered(images, batch_size, seed, start_step, workers, share)
    return ((batch, labels[indices]) for batch, indices in numbered)


def labels_of(images: Images) -> Tensor:
    """Returns the labels (N,) int64 of a data set.

    Raises:
        DataError: it has none.
    """
    if images.labels is None:
        raise DataError(
            "the data has no labels: sort the images into one folder a class, or give a "
            "dataset.json, or data whose format has labels"
        )
    return images.labels


def drop_labels(labels: Tensor, n_classes: int, uniform: Tensor, probability: float) -> Tensor:
    """Replaces labels (B,) by n_classes, which means no class, with a probability.

    A network that is trained so gives scores with and without a class, as classifier-free guidance
    needs (Ho & Salimans 2022).

    Args:
        uniform: (B,) in [0, 1).
    """
    return torch.where(uniform < probability, n_classes, labels)


Numbered = Iterator[tuple[Tensor, list[int]]]  # batches with the indices of their images


def _numbered(
    images: Images, batch_size: int, seed: int, start_step: int, workers: int, share: slice
) -> Numbered:
    """Yields this share of every batch, with the indices of its images."""
    order = batch_indices(len(images), batch_size, seed=seed, start_step=start_step)
    places = (indices[share] for indices in order)
    return _read(images, places, workers)


def _read(images: Images, order: Iterator[list[int]], workers: int) -> Numbered:
    if isinstance(images, MemoryImages):
        return ((images.images[indices], indices) for indices in order)
    order, again = itertools.tee(order)
    return zip(_decode(images, order, workers), again, strict=True)


def decoded(
    images: Images, order: Iterable[list[int]], workers: int
) -> Iterator[tuple[Tensor, dict[int, DataError]]]:
    """Yields the batches of `order`: the images that can be read, and errors by their place.

    Args:
        workers: processes that decode; 0 decodes in this one.
    """
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        _ErrorsAsValues(images),
        batch_sampler=order,  # an endless iterator is a valid sampler
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_interrupts,
    )
    return iter(loader)


def _decode(images: Images, order: Iterator[list[int]], workers: int) -> Iterator[Tensor]:
    """Yields the images of the batches; raises the first DataError."""
    for batch, errors in decoded(images, order, workers):
        for error in errors.values():
            raise error
        yield batch


class _ErrorsAsValues(torch.utils.data.Dataset[Tensor | DataError]):
    """Data set that returns errors as values; a worker would wrap them in its own traceback."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Tensor | DataError:
        try:
            return self.images[index]
        except DataError as error:
            return error


def _collate(items: list[Tensor | DataError]) -> tuple[Tensor, dict[int, DataError]]:
    good = [item for item in items if isinstance(item, Tensor)]
    errors = {place: e for place, e in enumerate(items) if isinstance(e, DataError)}
    return (torch.stack(good) if good else torch.empty(0)), errors


def _ignore_interrupts(worker: int) -> None:
    """Ignores Ctrl-C in a worker.

    The signal reaches the whole process group; only the trainer handles it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
