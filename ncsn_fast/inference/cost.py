"""Estimated cost of a sampling call, before it runs."""

from __future__ import annotations

import copy
import dataclasses
import math
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ncsn_fast import ops
from ncsn_fast.engines.base import Engine
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.samplers.procedure import Procedure
from ncsn_fast.samplers.program import Chains, Program, table


@dataclasses.dataclass(frozen=True)
class CostEstimate:
    """Estimated work of one call.

    Attributes:
        nfe: network evaluations per sample; None if only the run shows them.
        batch_size, n_batches: micro-batches; the last one is padded.
        flop: of all network evaluations, padding included (2 per multiply-add, convolutions only);
            of one evaluation of every sample if nfe is None.
        seconds: estimate for the same work, from a few steps timed on this machine.
        memory: bytes that the engine and the chains of a micro-batch need beside the model; None
            if the engine does not plan them.
    """

    method: str
    engine: str
    dtype: str
    device: str
    n: int
    nfe: int | None
    batch_size: int
    n_batches: int
    flop: float
    seconds: float
    memory: int | None

    def __str__(self) -> str:
        memory = "" if self.memory is None else f", {self.memory / 1e6:.4g} MB beside the model"
        each, work = f"{self.nfe} network evaluations each", ""
        if self.nfe is None:
            each = "as many network evaluations as each needs"
            work = " for one evaluation of all samples"
        return (
            f"{self.method}: {self.n} samples, {each}, "
            f"{self.n_batches} micro-batches of {self.batch_size}\n"
            f"engine {self.engine}, {self.dtype}, on {self.device}: {self.flop / 1e12:.3g} TFLOP, "
            f"about {self.seconds:.3g} s{work}{memory}"
        )


def network_flop(model: ScoreModel) -> int:
    """Returns the FLOP of one network evaluation of one image, counted on the meta device."""
    shadow = copy.deepcopy(model).to("meta")
    x = torch.empty(1, *model.image_shape, device="meta")
    condition = model.condition(torch.ones(1, device=model.device))
    if condition is not None:
        condition = condition.to("meta")
    with ops.backend("reference"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(x, condition)
    return int(counter.get_total_flops())


def estimate_cost(
    engine: Engine, program: Program | Procedure, n: int, *, guidance: bool = False
) -> CostEstimate:
    """Estimates the cost of n samples from a few timed steps, after a warm-up of as many.

    Classifier-free guidance takes every evaluation twice.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0; got {n}")
    size = engine.batch_size
    n_batches = -(-n // size)
    evaluations = (1 if program.nfe is None else program.nfe) * (1 + guidance)
    one = program if isinstance(program, Program) else _one_row(program)
    seconds = _seconds_of_a_row(engine, one) * evaluations * n_batches
    state = size * math.prod(engine.model.image_shape) * torch.float32.itemsize
    planned, chains = engine.memory(), (2 + one.has_history) * state  # and the result
    return CostEstimate(
        method=program.name,
        engine=engine.name,
        dtype=engine.dtype,
        device=str(engine.device),
        n=n,
        nfe=program.nfe,
        batch_size=size,
        n_batches=n_batches,
        flop=float(network_flop(engine.model) * evaluations * n_batches * size),
        seconds=seconds,
        memory=None if planned is None else planned + chains,
    )


def _one_row(procedure: Procedure) -> Program:
    """Returns a table of one row, which takes about as long as a step of a procedure."""
    one = np.ones(1)
    return table(procedure.name, procedure.sigma[:1], np.zeros(1, np.int64), b=one, c=one)


def _seconds_of_a_row(engine: Engine, program: Program) -> float:
    """Times network and update; on a GPU over several rows, so that launch overhead is hidden."""
    part = program.head(16 if engine.device.type == "cuda" else 1)
    if not part.nfe:
        return 0.0
    x = torch.full((engine.batch_size, *engine.model.image_shape), 0.5, device=engine.device)
    samples = torch.arange(engine.batch_size, device=engine.device)
    seconds = 0.0
    for _ in range(2):
        chains = Chains(x=x.clone(), seed=0, samples=samples)
        began = time.perf_counter()
        engine.run(part, chains).cpu()
        seconds = time.perf_counter() - began
    return seconds / part.nfe
