"""Precision check of engines that hand the network to an external compiler or runtime."""

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
from ncsn_fast.models.adapter import ParameterisedConfig
from ncsn_fast.models.score import ModelConfig, ScoreModel


def takes_sigma(model: ScoreModel) -> bool:
    """Whether a model's exported graph has the noise level as an input, "sigma" (N,) float32."""
    return isinstance(model.config, ParameterisedConfig) or model.conditioning != "none"


def exported_condition(model: ScoreModel, sigma: Tensor) -> Tensor | None:
    """Returns the noise level's input of a model's exported graph; None without one."""
    return sigma.float() if takes_sigma(model) else None


class ContiguousEngine(EagerEngine):
    """The reference on contiguous maps: channels-last group norm in torch loses two digits."""

    def __init__(self, model: ScoreModel, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.replica.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def _arranged(self, x: Tensor) -> Tensor:
        return x


def largest_error(
    engine: Engine, model: ScoreModel, size: tuple[int, int], levels: int, batch: int
) -> float:
    """Returns the largest error of f over noise levels, for images of one size (H, W).

    Args:
        model: the model that the engine was built from, with its weights.
        levels: number of noise levels.   batch: images per micro-batch.

    Raises:
        EngineError: see precision.check_precision.
    """
    probed, probe = copy.copy(model), copy.copy(engine)
    if size != model.config.image_size:
        assert isinstance(model.config, ModelConfig)  # others have one size
        probed.config = dataclasses.replace(model.config, image_size=size)
    probe.model, probe.batch_size = probed, batch
    probe.release()
    reference = ContiguousEngine(
        probed, device=engine.device, dtype="fp32", batch_size=batch, threads=engine.threads
    )
    return precision.check_precision(probe, reference, levels)


def check_precision(engine: Engine, size: int | None = None) -> tuple[float, int]:
    """Returns the largest error of f against the reference, and the number of levels checked.

    Args:
        engine: its `model` must still have its weights.
        size: images per micro-batch in the check; None for one per level, at most the engine's
            own number.

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
