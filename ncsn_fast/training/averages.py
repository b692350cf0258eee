"""Moving averages of the weights (EMA), by decay per step or by half-life in images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ncsn_fast.models.score import ScoreModel
from ncsn_fast.training.configs import TrainConfig

RAMP = 0.05  # a half-life is at most this share of the images seen (EDM: ema_rampup_ratio)


@dataclasses.dataclass(frozen=True)
class Decay:
    """Rule of one average: theta' = m theta' + (1 - m) theta after each step.

    Attributes:
        name: in checkpoints and TensorBoard.
        per_step: m; 0 where a half-life is given.
        halflife: images after which a weight's share in the average has halved.
        warmup: let the average forget its start.
    """

    name: str
    per_step: float = 0.0
    halflife: float = 0.0
    warmup: bool = True

    def at(self, step: int, batch_size: int) -> float:
        """Returns m at a step, counted from 0."""
        n = step + 1
        if self.halflife:
            seen = RAMP * n * batch_size if self.warmup else self.halflife
            return 0.5 ** (batch_size / max(min(self.halflife, seen), 1e-8))
        return min(self.per_step, (1 + n) / (10 + n)) if self.warmup else self.per_step

    def settled(self, batch_size: int) -> int:
        """Returns the steps after which initial weights are at most 5 % of the average.

        With a warm-up they are gone after a few.
        """
        m = self.at(0, batch_size)
        return 0 if self.warmup or m <= 0 else math.ceil(math.log(0.05) / math.log(m))


def decays(config: TrainConfig) -> list[Decay]:
    """Returns the rules of a configuration: one for each half-life, else one decay, or none."""
    if config.ema_halflife:
        return [
            Decay(f"{halflife:g}", halflife=halflife, warmup=config.ema_warmup)
            for halflife in config.ema_halflife
        ]
    return [Decay("ema", config.ema, warmup=config.ema_warmup)] if config.ema > 0 else []


class Averages:
    """All averages of a model; they start at its initial weights.

    Attributes:
        chosen: name of the one that the run is sampled by, the first until `choose`.
    """

    def __init__(self, model: ScoreModel, config: TrainConfig) -> None:
        self.batch_size = config.batch_size
        self.decays = {decay.name: decay for decay in decays(config)}
        self._decay = 0.0
        self._models = {
            name: AveragedModel(model, multi_avg_fn=self._average) for name in self.decays
        }
        for average in self._models.values():
            average.update_parameters(model)
        self.chosen = next(iter(self.decays), "")

    def _average(self, averaged: Any, current: Any, n_averaged: Any) -> None:
        get_ema_multi_avg_fn(self._decay)(averaged, current, n_averaged)

    def __bool__(self) -> bool:
        return bool(self._models)

    def update(self, model: ScoreModel, step: int) -> None:
        """Moves every average towards the weights after a step."""
        for name, average in self._models.items():
            self._decay = self.decays[name].at(step, self.batch_size)
            average.update_parameters(model)

    def models(self) -> dict[str, ScoreModel]:
        """Returns the averaged models by name."""
        found = {name: average.module for name, average in self._models.items()}
        assert all(isinstance(module, ScoreModel) for module in found.values())
        return found  # type: ignore[return-value]  # AveragedModel.module is any Module

    def choose(self, losses: Mapping[str, float]) -> None:
        """Chooses the average of the least held-out loss."""
        self.chosen = min(self._models, key=lambda name: losses[name], default="")

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns the weights of all but the chosen one, which a checkpoint has beside them."""
        return {k: m.state_dict() for k, m in self.models().items() if k != self.chosen}

    def load_state_dict(
        self, chosen: str, weights: Mapping[str, Tensor], others: Mapping[str, Any]
    ) -> None:
        """Restores the averages.

        Raises:
            ValueError: they have other half-lives.
        """
        if set(others) | {chosen} != set(self._models):
            raise ValueError(f"it has the averages {', '.join(sorted({chosen, *others}))}")
        self.chosen = chosen
        for name, model in self.models().items():
            model.load_state_dict(weights if name == chosen else others[name])


def finite(model: ScoreModel) -> str | None:
    """Returns the name of a weight that is not finite, or None."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            return name
    return None
