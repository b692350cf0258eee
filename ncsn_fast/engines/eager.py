"""engine="eager": plain PyTorch in float32, the reference for all other engines."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.torch_settings import cudnn_precision, to_channels_last
from ncsn_fast.models.score import ScoreModel


class EagerEngine(Engine):
    """The model's own modules with every fused op replaced by its plain PyTorch definition.

    Channels-last, so that oneDNN's convolutions give the same bits for any number of threads.
    """

    name = "eager"
    summary = "plain PyTorch, float32, CPU or GPU: the reference for all others"
    device_types = ("cpu", "cuda")

    def __init__(self, model: ScoreModel, *, device: torch.device, **settings: Any) -> None:
        super().__init__(model, device=device, **settings)
        self.replica = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        to_channels_last(self.replica)

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    def network(self, x: Tensor, level: Tensor | None, labels: Tensor | None = None) -> Tensor:
        with cudnn_precision("ieee", self.device):  # TF32 is torch's default in convolutions
            more = () if labels is None else (labels,)
            return self.replica(self._arranged(x), level, *more)

    def _arranged(self, x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last)

    def exact(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Returns f computed in float64, one image at a time; on the CPU."""
        network = copy.deepcopy(self.replica).double()
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        conditions = [None] * len(x) if condition is None else condition.to(self.device).split(1)
        images = x.to(self.device, torch.float64).split(1)
        with self.context():
            f = [network(one, seen).cpu() for one, seen in zip(images, conditions, strict=True)]
        return torch.cat(f)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with super().context(), ops.backend("reference"):
            yield
