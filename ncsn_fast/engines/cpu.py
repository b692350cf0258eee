"""engine="cpu": channels-last PyTorch convolutions with our C++ kernels between and around them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ncsn_fast.engines.base import DTYPES, Engine, check_precision
from ncsn_fast.models.score import ScoreModel

# Relative error of f against eager float32 that a build may have.
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}


class CpuEngine(Engine):
    """A channels-last copy of the network; IN++ and the sampler update run in the extension."""

    name = "cpu"
    summary = (
        "channels-last convolutions, our C++ norm and sampler kernels (AVX-512, AVX2 or scalar)"
    )
    dtypes = ("fp32", "bf16")

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
        self.replica = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        for module in self.replica.modules():
            if isinstance(module, nn.Conv2d):  # norms keep float32 parameters whatever the type
                module.to(DTYPES[dtype])
        self.replica.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.error = check_precision(self, bound=BOUNDS[dtype])

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    def network(self, x: Tensor, level: Tensor | None) -> Tensor:
        return self.replica(x.to(DTYPES[self.dtype], memory_format=torch.channels_last), level)
