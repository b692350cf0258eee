"""Base classes of engines that run a network on preallocated buffers."""

from __future__ import annotations

import abc
import copy
import threading
from typing import Any, Self

from ncsn_fast.engines import precision, verdicts
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.lowering.graph import UnsupportedNetwork, lower
from ncsn_fast.models.adapter import WrappedConfig
from ncsn_fast.models.score import ScoreModel


class BufferedEngine(Engine):
    """An engine with buffers of fixed sizes, which serves one call at a time."""

    def resized(self, batch_size: int) -> Self:
        other = copy.copy(self)
        other.batch_size, other._doubled = batch_size, None
        other.release()
        return other

    @abc.abstractmethod
    def release(self) -> None:
        self._lock = threading.RLock()


class StaticEngine(BufferedEngine):
    """An engine for the networks that `graph.lower` supports, with one plan per image size."""

    def resized(self, batch_size: int) -> StaticEngine:
        other = super().resized(batch_size)
        assert isinstance(other, StaticEngine)
        return other

    @classmethod
    def refuses(cls, model: ScoreModel) -> str | None:
        if isinstance(model.config, WrappedConfig):
            return "does not run networks that were wrapped"
        try:
            lower(model.net, *model.config.image_size)
        except UnsupportedNetwork as error:
            return f"does not run networks with {error}"
        return None

    @abc.abstractmethod
    def prepare(self) -> None:
        """Builds the plan for the model's image size, and with it the weights that plans share."""

    def check_precision(self) -> float:
        """Returns the error of a small plan with the same weights against the reference.

        Both run at the first start only; see `verdicts`.
        """
        flop = lower(self.model.net, *self.model.config.image_size).flop
        n = precision.probe_count(self.model, flop)
        small = self.resized(min(n, self.batch_size))
        small.prepare()

        def check() -> float:
            reference = EagerEngine(
                self.model,
                device=self.device,
                dtype="fp32",
                batch_size=small.batch_size,
                threads=self.threads,
            )
            return precision.check_precision(small, reference, n)

        return verdicts.remembered(self.check_facts(), check)

    def check_facts(self) -> dict[str, Any]:
        """Returns what the error depends on beside the package and the machine."""
        return {
            "model": self.model.digest(),
            "engine": self.name,
            "dtype": self.dtype,
            "device": self.device.type,
        }
