"""Methods that are no tables: how each turns a model, levels and options into a Procedure."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch

from ncsn_fast.models.score import ScoreModel
from ncsn_fast.samplers.adaptive import adaptive as solver
from ncsn_fast.samplers.correctors import CORRECTORS
from ncsn_fast.samplers.levels import Levels
from ncsn_fast.samplers.ode import probability_flow
from ncsn_fast.samplers.plain import (
    Constrain,
    OnStep,
    Procedure,
    Result,
    Score,
    chains_noise,
)
from ncsn_fast.samplers.predictor_corrector import (
    Corrector,
    Move,
    Norm,
    Order,
    Predictor,
    check_options,
    evaluations,
    predictor_corrector,
)
from ncsn_fast.samplers.program import Chains

log = logging.getLogger(__name__)

Chain = Literal["ula", "mala", "hmc"]  # of CORRECTORS


def pc(
    model: ScoreModel,
    levels: Levels,
    *,
    predictor: Predictor = "reverse_diffusion",
    corrector: Corrector | Chain = "langevin",
    corrector_steps: int = 1,
    order: Order = "corrector_first",
    snr: float = 0.16,
    norm: Norm = "sample",
    relative_step: float | None = None,
    denoise: bool = True,
) -> Procedure:
    """Predictor-corrector sampling: `steps` levels (the model's own), NFE = steps * (1 + corrector
    steps); correctors "mala" and "hmc" take several evaluations a step (correctors.py).

    snr and norm are of "langevin" (snr also of "annealed"). The published code's norms are means
    over the batch; "sample" takes each sample's own, so that a sample does not depend on the
    others. norm="batch" does, over the micro-batch. relative_step, h / sigma, is of the chains.
    """
    ladder = levels.between_the_ends(model, None)
    if norm == "batch":
        log.warning('norm="batch": a sample depends on the others of its micro-batch')
    options: dict[str, Any] = {
        "predictor": predictor,
        "corrector_steps": corrector_steps,
        "order": order,
        "snr": snr,
        "norm": norm,
    }
    kind = CORRECTORS.get(corrector)
    check_options(**options, corrector=corrector, noise_norm="drawn", also=tuple(CORRECTORS))
    if kind is None and relative_step is not None:
        raise ValueError(f"relative_step is of {', '.join(CORRECTORS)}; {corrector!r} has snr")

    def solve(
        score: Score, chains: Chains, constrain: Constrain | None, on_step: OnStep | None
    ) -> Result:
        return predictor_corrector(
            score,
            chains.x,
            ladder,
            chains_noise(chains),
            **options,
            corrector=_corrector(corrector, chains, relative_step),  # type: ignore[arg-type]
            denoise=denoise,
            constrain=constrain,
            on_level=on_step,
        )

    each = 1 if kind is None else kind(0, torch.zeros(0, dtype=torch.int64)).nfe
    nfe = evaluations(len(ladder), predictor, corrector_steps, each)
    return Procedure("pc", ladder, nfe, solve, constrains=True)


def _corrector(name: Corrector | Chain, chains: Chains, relative_step: float | None) -> str | Move:
    """What predictor_corrector takes: a name, or the move of that name for these chains."""
    if name not in CORRECTORS:
        return name
    if chains.noise_weights is not None:
        raise ValueError(
            f"corrector {name!r} makes its own noise, which interpolation cannot mix; take "
            "langevin or annealed"
        )
    return CORRECTORS[name](chains.seed, chains.samples, relative_step)


def ode(
    model: ScoreModel,
    levels: Levels,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    denoise: bool = True,
) -> Procedure:
    """Probability flow by Dormand & Prince's pair 5(4), each sample with steps of its own.

    NFE follows from the tolerances; the published ones are 1e-5. It draws no noise but its start,
    so that it maps a start to an image, and back.
    """
    ends = _ends("ode", model, levels)

    def solve(score: Score, chains: Chains, _: Constrain | None, on_step: OnStep | None) -> Result:
        options: Any = {"rtol": rtol, "atol": atol, "denoise": denoise, "compact": False}
        return probability_flow(score, chains.x, *ends, **options, on_step=on_step)

    return Procedure("ode", np.array(ends), None, solve, draws_noise=False)


def adaptive(
    model: ScoreModel,
    levels: Levels,
    *,
    rtol: float = 0.02,
    atol: float = 1 / 256,
    denoise: bool = True,
) -> Procedure:
    """Adaptive steps on the reverse SDE ("Gotta go fast"), each sample with its own.

    NFE follows from the tolerances: for CIFAR-10 the paper names 738, 490, 271 and 170 on average
    at rtol 0.01, 0.02, 0.05 and 0.1.
    """
    ends = _ends("adaptive", model, levels)
    if ends[0] == ends[1]:
        raise ValueError("method 'adaptive' has no way to go on a ladder of one level")

    def solve(score: Score, chains: Chains, _: Constrain | None, on_step: OnStep | None) -> Result:
        options: Any = {"rtol": rtol, "atol": atol, "denoise": denoise, "compact": False}
        noise = chains_noise(chains)
        return solver(score, chains.x, *ends[::-1], noise, **options, on_step=on_step)

    return Procedure("adaptive", np.array(ends), None, solve)


def _ends(name: str, model: ScoreModel, levels: Levels) -> tuple[float, float]:
    """Where a method that chooses its steps begins and ends."""
    if levels.steps is not None:
        raise ValueError(f"method {name!r} chooses its own steps; give rtol and atol instead")
    own = levels.own(model)
    return float(own[0]), float(own[-1])
