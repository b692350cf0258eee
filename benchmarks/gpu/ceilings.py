"""Measured limits of the device: memory copy bandwidth and bfloat16 matrix product FLOP/s."""

from __future__ import annotations

import torch
from race import Entrant, relative_error
from torch import Tensor

from gpu.section import Section

COPY, MATMUL = "device copy", "bf16 matrix product"


def measure(section: Section) -> None:
    """Measures bytes per second, read plus written, and FLOP per second on random numbers."""
    section.plan([(COPY, ["copy"]), (MATMUL, ["matmul"])])
    numbers, size = (1 << 12, 64) if section.small else (1 << 29, 8192)
    section.race(COPY, {"copy": lambda: _copy(section, numbers)}, seconds=2.0, bytes=4 * numbers)
    section.race(
        MATMUL, {"matmul": lambda: _matmul(section, size)}, seconds=3.0, flop=2 * size**3, side=size
    )


def _copy(section: Section, numbers: int) -> Entrant:
    source = torch.randn(numbers, dtype=torch.bfloat16, device=section.device)
    target = torch.empty_like(source)
    run, calls = section.lap_of([lambda: target.copy_(source)])
    return Entrant(run, lambda: float(not torch.equal(source, target)), 0.0, {"calls": calls})


def _matmul(section: Section, size: int) -> Entrant:
    a, b = (torch.randn(size, size, device=section.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)

    def error() -> float:
        product: Tensor = torch.mm(a, b)[:64]
        return relative_error(product, a[:64].double() @ b.double())

    run, calls = section.lap_of([lambda: torch.mm(a, b, out=out)])
    return Entrant(run, error, 1e-2, {"calls": calls})
