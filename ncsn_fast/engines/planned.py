"""What engines share that run a network on buffers of their own."""

from __future__ import annotations

import abc
import copy
import threading

from torch import Tensor

from ncsn_fast.engines import precision
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.graph import UnsupportedNetwork, lower
from ncsn_fast.models.score import ScoreModel


class BufferedEngine(Engine):
    """An engine with buffers of fixed sizes, which serve one call at a time."""

    def resized(self, batch_size: int) -> BufferedEngine:
        other = copy.copy(self)
        other.batch_size = batch_size
        other.release()
        return other

    @abc.abstractmethod
    def release(self) -> None:
        self._busy = threading.RLock()

    def check_images(self, x: Tensor) -> None:
        """ValueError unless x is a micro-batch of images that the network takes."""
        self.model.net.check_input(x)
        if len(x) != self.batch_size:
            raise ValueError(f"this engine runs batches of {self.batch_size}; got {len(x)} images")

    def check_call(self, x: Tensor, level: Tensor | None) -> None:
        """ValueError unless `network` takes these."""
        self.check_images(x)
        seen = self.model.conditioning
        if seen != "none" and level is None:
            what = "noise level" if seen == "level" else seen
            raise ValueError(f"this network is conditioned on the {what}: pass {seen} (N,)")


class PlannedEngine(BufferedEngine):
    """An engine for the networks that `graph.lower` covers, one plan for each image size."""

    @classmethod
    def refuses(cls, model: ScoreModel) -> str | None:
        try:
            lower(model.net, *model.config.image_size)
        except UnsupportedNetwork as error:
            return f"does not run networks with {error}"
        return None

    def check_precision(self) -> float:
        """The error of a small plan of the same weights against the reference."""
        flop = lower(self.model.net, *self.model.config.image_size).flop
        n = precision.probe_count(self.model, flop)
        size = min(n, self.batch_size)
        reference = EagerEngine(
            self.model, device=self.device, dtype="fp32", batch_size=size, threads=self.threads
        )
        return precision.check_precision(self.resized(size), reference, n)
