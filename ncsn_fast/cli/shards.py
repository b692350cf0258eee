"""Sampling by several processes: which samples each one draws, and how ranks synchronise.

A request of n samples is cut into micro-batches, and those into one contiguous block for each
process. Blocks depend only on n, the size of a micro-batch and the number of processes, so every
file has one writer without communication. Ranks of one launch (torchrun) synchronise twice: at the
start, so that a machine is timed once, and at the end, for the totals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from ncsn_fast import engines
from ncsn_fast.cli.command import UsageError
from ncsn_fast.cli.shard import Shard

# All ranks of a launch start together; one that is not there by then is missing.
_INIT_TIMEOUT = timedelta(minutes=30)
# Longer than any run: when resuming, one rank may have all the work and another none. A rank that
# dies closes its connections and is noticed at once; only a machine that vanishes silently leads to
# this timeout. Gloo counts milliseconds in 31 bits: < 24.8 days.
_COLLECTIVE_TIMEOUT = timedelta(days=20)

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclasses.dataclass(frozen=True)
class DistributedState:
    """Place of this process among those that draw one request.

    Attributes:
        shard: the part of this process.
        group: process group of the launch; None for a process on its own or of a job array.
        local_rank: rank on this machine.   local_count: number of ranks on this machine.
    """

    shard: Shard
    group: dist.ProcessGroup | None = None
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_main_process(self) -> bool:
        """True in rank 0, and outside of a process group."""
        return self.group is None or self.shard.index == 0

    @contextlib.contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Runs the block in local rank 0 of each machine first, then in the other ranks."""
        if self.group is None:
            yield
        elif self.local_rank == 0:
            yield
            self._barrier()
        else:
            self._barrier()
            yield

    def totals(self, *counts: int) -> list[int]:
        """Returns sums over all ranks, and waits for all of them."""
        sums = torch.tensor(counts, dtype=torch.int64)
        if self.group is not None:
            with _explain_peer_failure():
                dist.all_reduce(sums, group=self.group)
        return [int(s) for s in sums]

    def device(self, engine: str, device: str | None) -> str | None:
        """Returns the device of this process; ranks on GPUs get one each.

        Raises:
            UsageError: a device with a number, or fewer GPUs than ranks.
        """
        if self.group is None or engines.pick(engine, device)[1].type != "cuda":
            return device
        if device is not None and torch.device(device).index is not None:
            raise UsageError(
                f"--device {device} would put all ranks on one GPU; leave the number out, and "
                "each takes its own"
            )
        gpus, ranks = torch.cuda.device_count(), max(self.local_count, self.local_rank + 1)
        if ranks > gpus:
            raise UsageError(
                f"{ranks} ranks on this machine, but torch sees {gpus} GPUs: start at most {gpus}, "
                "or give --device cpu (where every rank sees only a GPU of its own, set "
                "LOCAL_RANK=0 for each)"
            )
        torch.cuda.set_device(self.local_rank)  # else each rank would create a context on GPU 0
        return f"cuda:{self.local_rank}"

    def _barrier(self) -> None:
        with _explain_peer_failure():
            dist.barrier(group=self.group)


@contextlib.contextmanager
def distributed(
    shard: Shard | None, otherwise: str = "draw with --shard, which needs no connection"
) -> Iterator[DistributedState]:
    """Joins the process group if torchrun (or whatever sets its variables) started this process.

    Args:
        shard: value of --shard, or None.
        otherwise: what works where the ranks cannot be connected, for messages.

    Raises:
        UsageError: both at once, or only some of the variables.
    """
    found = _from_environment(os.environ)
    if found is None:
        yield DistributedState(shard or Shard())
        return
    if shard is not None:
        raise UsageError(
            f"--shard {shard} within a launch of {found.shard.count} ranks, which share the "
            "samples by themselves; leave out --shard, or torchrun"
        )
    package = logging.getLogger("ncsn_fast")
    level = package.level
    package.setLevel(level if found.shard.index == 0 else logging.ERROR)
    try:
        yield dataclasses.replace(found, group=_init_process_group(otherwise))
    finally:
        package.setLevel(level)
        if dist.is_initialized():
            dist.destroy_process_group()


def _from_environment(environment: Mapping[str, str]) -> DistributedState | None:
    """Returns the state that the environment describes, not yet connected, or None."""
    missing = [name for name in _VARIABLES if not environment.get(name)]
    if missing:
        if environment.get("WORLD_SIZE", "1") not in ("", "1"):
            raise UsageError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {' and '.join(missing)} not set: "
                "start with torchrun, or unset it and use --shard"
            )
        return None
    try:
        rank, world, local = (int(environment[name]) for name in _VARIABLES)
        local_count = int(environment.get("LOCAL_WORLD_SIZE") or 1)
    except ValueError:
        rank = world = local = -1
    if not 0 <= local <= rank < world:
        given = ", ".join(f"{name}={environment[name]}" for name in _VARIABLES)
        raise UsageError(f"a launch counts its ranks from 0 below WORLD_SIZE; got {given}")
    return DistributedState(Shard(rank, world), None, local, local_count)


def _init_process_group(otherwise: str) -> dist.ProcessGroup:
    """Connects all ranks of the launch over gloo, which carries numbers of the host."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise RuntimeError(f"this build of torch has no gloo to connect ranks; {otherwise}")
    try:
        dist.init_process_group("gloo", timeout=_INIT_TIMEOUT)
        group = dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"the ranks cannot reach each other: {_first_line(error)}. Start them with torchrun "
            f"(GLOO_SOCKET_IFNAME names the network interface to use), or {otherwise}"
        ) from error
    assert group is not None
    return group


@contextlib.contextmanager
def _explain_peer_failure() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "another rank has stopped, or cannot be reached any more; see what it says. Files that "
            "are written stay: the same command goes on from them, with any number of ranks"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
