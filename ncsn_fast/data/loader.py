"""Training batches: their order, a pure function of seed and step, and their loading."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ncsn_fast.data.datasets import DataError, Images, MemoryImages


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
    whole = batch_indices(len(images), batch_size, seed=seed, start_step=start_step)
    order = (indices[share] for indices in whole)
    if isinstance(images, MemoryImages):
        return (images.images[indices] for indices in order)
    loader: torch.utils.data.DataLoader[Tensor | DataError] = torch.utils.data.DataLoader(
        _ErrorsAsValues(images),
        batch_sampler=order,  # an endless iterator is a valid sampler
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_interrupts,
    )
    return _raising(loader)


class _ErrorsAsValues(torch.utils.data.Dataset[Tensor | DataError]):
    """Data set that returns errors as values; a worker would wrap them in its own traceback."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Tensor | DataError:
        try:
            return self.images[index]
        except DataError as error:
            return error


def _collate(items: list[Tensor | DataError]) -> Tensor | DataError:
    errors = [item for item in items if isinstance(item, DataError)]
    return errors[0] if errors else torch.stack([t for t in items if isinstance(t, Tensor)])


def _raising(batches: Iterable[Tensor | DataError]) -> Iterator[Tensor]:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _ignore_interrupts(worker: int) -> None:
    """Ignores Ctrl-C in a worker.

    The signal reaches the whole process group; only the trainer handles it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
