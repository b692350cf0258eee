"""engine="eager": plain PyTorch in float32 on any device; the reference for all others."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.engines.base import Engine
from ncsn_fast.models.score import ScoreModel


class EagerEngine(Engine):
    """The model's own modules, every fused op replaced by its plain PyTorch statement."""

    name = "eager"
    summary = "plain PyTorch, float32, any device: the reference for all others"

    def __init__(
        self,
        model: ScoreModel,
        *,
        device: torch.device,
        dtype: str,
        batch_size: int,
        threads: int | None = None,
    ) -> None:
        super().__init__(model, device=device, dtype=dtype, batch_size=batch_size, threads=threads)
        same_place = device == model.device or device.type == model.device.type == "cpu"
        self.replica = (model if same_place else copy.deepcopy(model).to(device)).eval()

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    def network(self, x: Tensor, level: Tensor | None) -> Tensor:
        return self.replica(x, level)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with super().context(), ops.backend("reference"):
            yield
