"""engine="cpu": channels-last PyTorch convolutions with our C++ kernels between and around them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ncsn_fast.engines.base import DTYPES, Engine, check_precision
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.models.score import ScoreModel

BF16_BOUND = 2e-2  # relative error of f against float32 that a bfloat16 build may have


class CpuEngine(Engine):
    """A channels-last copy of the network; IN++ and the sampler update run in the extension."""

    name = "cpu"
    summary = "channels-last convolutions, our C++ norm and update (AVX-512, AVX2 or scalar)"
    dtypes = ("fp32", "bf16")

    def __init__(self, model: ScoreModel, *, dtype: str, **settings: Any) -> None:
        super().__init__(model, dtype=dtype, **settings)
        self.replica = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        for module in self.replica.modules():
            if isinstance(module, nn.Conv2d):  # norms keep float32 parameters whatever the type
                module.to(DTYPES[dtype])
        self.replica.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if dtype == "bf16":
            check_precision(self, EagerEngine(model, dtype="fp32", **settings), bound=BF16_BOUND)

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    def network(self, x: Tensor, level: Tensor | None) -> Tensor:
        return self.replica(x.to(DTYPES[self.dtype], memory_format=torch.channels_last), level)
