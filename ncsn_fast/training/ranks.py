"""Processes that train one model: each computes the gradient of a share of every batch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        index: rank, from 0.
        count: number of ranks.
        host: process group for numbers on the CPU; None in a run of one process.
        device: process group for gradients; None for `host`.
    """

    index: int = 0
    count: int = 1
    host: dist.ProcessGroup | None = None
    device: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """True in the rank that writes."""
        return self.index == 0

    def share(self, n: int) -> slice:
        """Returns this rank's places in a batch of n images: contiguous, sizes differ by 1."""
        return slice(n * self.index // self.count, n * (self.index + 1) // self.count)

    def wrap(self, objective: nn.Module) -> nn.Module:
        """Returns a module whose gradients are averaged over the ranks."""
        if self.host is None:
            return objective
        return DistributedDataParallel(objective, process_group=self.device or self.host)

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set in any rank; all ranks must call it."""
        return bool(self.sum(torch.tensor([float(flag)])))

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a CPU tensor over the ranks; all ranks must call it."""
        if self.host is not None:
            dist.all_reduce(values, group=self.host)
        return values

    def text(self, of_main: str) -> str:
        """Returns the main rank's text; all ranks must call it."""
        if self.host is None:
            return of_main
        found = [of_main]
        dist.broadcast_object_list(found, src=0, group=self.host)
        return found[0]


def without_reduction(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Context of a micro-batch's passes; only the last one of a step exchanges gradients."""
    if last or not isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


def micro_batches(n: int, count: int) -> Iterator[slice]:
    """Yields the places of `count` micro-batches of n images, less where n is smaller."""
    count = max(1, min(n, count))
    for i in range(count):
        yield slice(n * i // count, n * (i + 1) // count)
