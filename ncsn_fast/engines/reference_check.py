"""What engines share that give the network to a compiler or runtime of someone else."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ncsn_fast.engines import precision
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.models.score import ScoreModel

# What networks are conditioned on (ScoreModel.conditioning), as graphs take it.
CONDITIONS = {"level": torch.int64, "time": torch.float32}


class ContiguousEngine(EagerEngine):
    """The reference on contiguous maps: torch's channels-last group norm loses two digits."""

    def __init__(self, model: ScoreModel, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.replica.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def network(self, x: Tensor, level: Tensor | None) -> Tensor:
        return self.replica(x, level)


def largest_error(
    engine: Engine, model: ScoreModel, size: tuple[int, int], levels: int, batch: int
) -> float:
    """Of f over noise levels, for images of a size (H, W), in micro-batches of `batch`.

    Args:
        model: the one that the engine was built of, with its weights.

    Raises:
        EngineError: see precision.check_precision.
    """
    probed, probe = copy.copy(model), copy.copy(engine)
    probed.config = dataclasses.replace(model.config, image_size=size)
    probe.model, probe.batch_size = probed, batch
    probe.release()
    reference = ContiguousEngine(
        probed, device=engine.device, dtype="fp32", batch_size=batch, threads=engine.threads
    )
    return precision.check_precision(probe, reference, levels)


def check_precision(engine: Engine, size: int | None = None) -> tuple[float, int]:
    """The largest error of f against the reference, and the number of levels it was seen at.

    Args:
        engine: one whose `model` still has its weights.
        size: images of the engine's micro-batch in the check; None for as many as there are levels
            to see, at most its own.

    Raises:
        EngineError: see precision.check_precision.
    """
    model = engine.model
    reference = ContiguousEngine(
        model, device=engine.device, dtype="fp32", batch_size=1, threads=engine.threads
    )
    x, levels = precision.probes(model, 1)
    condition = model.condition(model.sigmas[levels.to(model.device)])
    with FlopCounterMode(display=False) as counter:
        reference.output(x, None if condition is None else condition.cpu())
    n = precision.probe_count(model, counter.get_total_flops())
    few = min(n, engine.batch_size)
    checked = engine if size == engine.batch_size else engine.resized(size or few)
    return precision.check_precision(checked, reference.resized(few), n), n
