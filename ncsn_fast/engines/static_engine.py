"""Base classes of engines that run a network on preallocated buffers."""

from __future__ import annotations

import abc
import copy
import threading
from typing import Any, Self

import torch

from ncsn_fast.engines import precision, verdicts
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.lowering.graph import Graph, UnsupportedNetwork
from ncsn_fast.engines.lowering.lower import lower
from ncsn_fast.models.score import ScoreModel


class BufferedEngine(Engine):
    """An engine with buffers of fixed sizes, which serves one call at a time."""

    def resized(self, batch_size: int) -> Self:
        other = copy.copy(self)
        other.batch_size = batch_size
        other.release()
        return other

    @abc.abstractmethod
    def release(self) -> None:
        self._lock = threading.RLock()


def lowered(model: ScoreModel, size: tuple[int, int], batch: int | None = None) -> Graph:
    """Lowers the network of a model for images of a size; see `lower`."""
    kinds = {"none": (), "level": (torch.int64,), "time": (torch.float32,)}
    shape = (model.config.channels, *size)
    if batch is None:
        return lower(model.net, shape, kinds[model.conditioning])
    return lower(model.net, shape, kinds[model.conditioning], batch)


class StaticEngine(BufferedEngine):
    """An engine for the networks that `lower` supports, with one plan per image size."""

    def resized(self, batch_size: int) -> StaticEngine:
        other = super().resized(batch_size)
        assert isinstance(other, StaticEngine)
        return other

    @classmethod
    def refuses(cls, model: ScoreModel) -> str | None:
        try:
            cls.check_graph(lowered(model, model.config.image_size))
        except UnsupportedNetwork as error:
            return f"does not run networks with {error}"
        return None

    @classmethod
    def check_graph(cls, graph: Graph) -> None:
        """Raises UnsupportedNetwork for an operation that the engine does not run."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """Builds the plan for the model's image size, and with it the weights that plans share."""

    def check_precision(self) -> float:
        """Returns the error of a small plan with the same weights against the reference.

        Both run at the first start only; see `verdicts`.
        """
        flop = lowered(self.model, self.model.config.image_size).flop
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
