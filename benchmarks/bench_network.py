"""Benchmarks of one network forward: every provider of providers.py, interleaved."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import memory
import pytest
from providers import PROVIDERS
from race import Absent, Entrant, relative_error
from torch import Tensor
from workloads import WORKLOADS, expected_output, is_first, make

from ncsn_fast import ScoreModel
from ncsn_fast.inference.cost import network_flop


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("workload", WORKLOADS)
def bench_network(race: Callable[..., None], workload: str, provider: str) -> None:
    """Times f(x) of images given as float32 NCHW."""

    def builders(settings: Any) -> dict[str, Callable[[], Entrant]]:
        model, x = make(WORKLOADS[workload], small=settings.small)
        field = Field(workload, model, x, expected_output(model, x), settings)
        return {name: functools.partial(_enter, name, field) for name in settings.names}

    race(builders, WORKLOADS[workload].title)


@dataclasses.dataclass(frozen=True)
class Field:
    """Common inputs of all entrants of a race."""

    workload: str
    model: ScoreModel
    x: Tensor
    expected: Tensor
    settings: Any


def _enter(name: str, field: Field) -> Entrant:
    row = PROVIDERS[name]
    row.check()
    small = field.settings.small
    first = is_first(WORKLOADS[field.workload])
    if row.compiles and small and not first:
        raise Absent("a small run compiles and exports for its first group only")
    info = {
        "workload": field.workload,
        "dtype": row.dtype,
        "summary": row.summary,
        "batch": len(field.x),
        "flop": len(field.x) * network_flop(field.model),
    }
    # A small run measures one provider's memory only: each needs a process that imports PyTorch.
    if field.settings.peak_memory and (not small or (first and name == "published")):
        info |= memory.measure(name, field.workload, small=small)
    run = row.build(field.model, field.x)

    def error() -> float:
        if row.complete:
            return relative_error(run(), field.expected)
        return run.error(field.model)

    return Entrant(run, error, row.bound, info)
