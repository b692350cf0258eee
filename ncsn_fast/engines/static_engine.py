"""Base classes of engines that run a network on preallocated buffers."""

from __future__ import annotations

import abc
import copy
import threading
from collections.abc import Mapping
from typing import Any, Self

import torch

from ncsn_fast.engines import precision, verdicts
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.lowering.export import PROBE
from ncsn_fast.engines.lowering.graph import Graph, UnsupportedNetwork
from ncsn_fast.engines.lowering.lower import lower
from ncsn_fast.engines.weights import without_weights
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


def noise_dtype(model: ScoreModel) -> torch.dtype | None:
    """Returns the dtype of the noise level that a network takes; None if it takes none."""
    return None if model.conditioning == "none" else model.parameterisation.noise_dtype


def lowered(model: ScoreModel, size: tuple[int, int], batch: int = PROBE) -> Graph:
    """Lowers the network of a model for states of a size; see `lower`."""
    return lower(model.net, (model.config.channels, *size), conditions(model), batch)


def conditions(model: ScoreModel) -> list[torch.dtype | None]:
    """Returns the types of the further inputs of a model's network; see `lower`."""
    return [noise_dtype(model), *([torch.int64] if model.n_classes else [])]


class StaticEngine(BufferedEngine):
    """An engine for the networks that `lower` supports, with one plan per image size."""

    _graphs: Mapping[tuple[int, int], Graph] = {}

    def resized(self, batch_size: int) -> StaticEngine:
        other = super().resized(batch_size)
        assert isinstance(other, StaticEngine)
        return other

    @classmethod
    def refuses(cls, model: ScoreModel) -> str | None:
        try:
            lowered(model, model.config.image_size)
        except UnsupportedNetwork as error:
            return f"does not run networks with {error}"
        return None

    def lowered(self, size: tuple[int, int]) -> Graph:
        """Returns the model's network for images of a size as the operations that plans run."""
        if size in self._graphs:
            return self._graphs[size]
        graph = lowered(self.model, size)
        if graph.batch not in (None, self.batch_size):
            graph = lowered(self.model, size, self.batch_size)
        return graph

    def forget_weights(self) -> None:
        """Replaces the model by a copy without the weights that plans have copies of."""
        graph = self.lowered(size := self.model.config.image_size)
        self.model = without_weights(self.model, graph.kept)
        if graph.batch is None:  # others are lowered for every batch size
            self._graphs = {size: graph.without_weights()}

    @abc.abstractmethod
    def prepare(self) -> None:
        """Builds the plan for the model's image size, and with it the weights that plans share."""

    def check_precision(self) -> float:
        """Returns the error of a small plan with the same weights against the reference.

        Both run at the first start only; see `verdicts`.
        """
        flop = self.lowered(self.model.config.image_size).flop
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
