"""Batches to train on: their order, which follows from seed and step alone, and their loading."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ncsn_fast.data.datasets import DataError, Images, MemoryImages


def batch_indices(
    n: int, batch_size: int, *, seed: int, start_step: int = 0
) -> Iterator[list[int]]:
    """Endless batches of indices: permutations, a pure function of (seed, step)."""
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
    images: Images, batch_size: int, *, seed: int, start_step: int = 0, workers: int = 0
) -> Iterator[Tensor]:
    """Endless uint8 batches (B, C, H, W) from `start_step` on, decoded by `workers` processes."""
    order = batch_indices(len(images), batch_size, seed=seed, start_step=start_step)
    if isinstance(images, MemoryImages):
        return (images.images[indices] for indices in order)
    loader: torch.utils.data.DataLoader[Tensor | DataError] = torch.utils.data.DataLoader(
        _Guarded(images),
        batch_sampler=order,  # an endless iterator is a legal sampler
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_leave_interrupts,
    )
    return _raising(loader)


class _Guarded(torch.utils.data.Dataset[Tensor | DataError]):
    """Images whose errors travel as values: a worker process would wrap them in its traceback."""

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


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the trainer alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
