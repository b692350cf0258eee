"""Benchmarks of a network that a user brings (user_unet.py): one forward on the CPU.

`ours-bf16-copies` copies every operand of a concatenation; `shares` of its row and of that of
`ours-bf16` say what concatenation takes of a forward, with and without
ncsn_fast/engines/lowering/concatenation.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from conditional_providers import EAGER, OTHERS, Forward, Provider, copying, enter
from race import Entrant
from user_unet import model

BATCHES = {"b1": 1, "b8": 8}
PROVIDERS = {
    "eager": EAGER,
    **OTHERS,
    "ours-bf16-copies": Provider(
        "engine cpu, concatenations copied", "bf16", copying("bf16"), 3e-2
    ),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("batch", BATCHES)
def bench_unet(race: Callable[..., None], batch: str, provider: str) -> None:
    """Times F(u, t) of inputs given as float32 NCHW."""

    def builders(settings: Any) -> dict[str, Callable[[], Entrant]]:
        return {name: functools.partial(_enter, name, batch, settings) for name in settings.names}

    race(builders, f"diffusers' DDPM U-Net 32x32, B = {BATCHES[batch]}")


def _enter(name: str, batch: str, settings: Any) -> Entrant:
    of = Forward.of(model(settings.small), BATCHES[batch])
    return enter(PROVIDERS[name], of, f"ddpm-cifar10-{batch}", small=settings.small)
