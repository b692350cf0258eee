"""Builders of the other methods: from a model, levels and options to a Procedure.

Each imports what it builds with when it is called: the command line reads their signatures before
torch is imported.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np

from ncsn_fast.samplers.choices import SNR, Chain, Corrector, Norm, Order, Predictor

if TYPE_CHECKING:
    from ncsn_fast.models.score import ScoreModel
    from ncsn_fast.samplers.level_selection import Levels
    from ncsn_fast.samplers.predictor_corrector import Move
    from ncsn_fast.samplers.procedure import Constrain, OnStep, Procedure, Result, Score
    from ncsn_fast.samplers.program import Chains

log = logging.getLogger(__name__)

LEAST_RTOL = 10 * float(np.finfo(np.float32).eps)


def pc(
    model: ScoreModel,
    levels: Levels,
    *,
    predictor: Predictor = "reverse_diffusion",
    corrector: Corrector | Chain = "langevin",
    corrector_steps: int = 1,
    order: Order = "corrector_first",
    snr: float | None = None,
    norm: Norm | None = None,
    relative_step: float | None = None,
    denoise: bool = True,
) -> Procedure:
    """Predictor-corrector sampling: `steps` levels, NFE = steps * (1 + corrector steps).

    Correctors "mala" and "hmc" take several evaluations a step (correctors.py). snr is of
    "langevin" and "annealed". norm is of "langevin": the published code's norms are means over the
    batch, here over the micro-batch; "sample", the default, takes each sample's own, so that a
    sample does not depend on the others. relative_step, h / sigma, is of the chains.
    denoise leaves out the noise of the last update: of a predictor that is the denoised sample.
    """
    from ncsn_fast.samplers import predictor_corrector as chain
    from ncsn_fast.samplers.procedure import Procedure, chains_noise

    ladder = levels.between_the_ends(model)
    options: dict[str, Any] = {
        "predictor": predictor,
        "corrector_steps": corrector_steps,
        "order": order,
        "snr": SNR if snr is None else snr,
        "norm": norm or "sample",
    }
    chain.check_options(**options, corrector=corrector, noise_norm="drawn", also=get_args(Chain))
    _refuse_idle(corrector, snr, norm, relative_step)
    if predictor == "none" and corrector_steps == 0:
        raise ValueError("predictor 'none' without corrector steps does nothing; give some")
    if norm == "batch":
        log.warning('norm="batch": a sample depends on the others of its micro-batch')

    def solve(
        score: Score, chains: Chains, constrain: Constrain | None, on_step: OnStep | None
    ) -> Result:
        return chain.predictor_corrector(
            score,
            chains.x,
            ladder,
            chains_noise(chains),
            **options,
            corrector=_corrector(corrector, chains, relative_step),
            denoise=denoise,
            count=chains.count,
            constrain=constrain,
            on_level=on_step,
        )

    each = _evaluations(corrector, relative_step)
    nfe = chain.evaluations(len(ladder), predictor, corrector_steps, each)
    return Procedure("pc", ladder, nfe, solve, constrains=True)


def _refuse_idle(
    corrector: str, snr: float | None, norm: str | None, relative_step: float | None
) -> None:
    """Raises ValueError if options of other correctors are given."""
    if corrector in get_args(Chain):
        idle = {"snr": snr, "norm": norm}
        has = "relative_step"
    else:
        idle = {"relative_step": relative_step, "norm": norm if corrector == "annealed" else None}
        has = "snr"
    for name, value in idle.items():
        if value is not None:
            raise ValueError(f"corrector {corrector!r} has no {name}; it has {has}")


def _evaluations(corrector: str, relative_step: float | None) -> int:
    """Returns the network evaluations of a corrector step."""
    import torch

    from ncsn_fast.samplers.correctors import CORRECTORS

    if corrector not in CORRECTORS:
        return 1
    return CORRECTORS[corrector](0, torch.zeros(0, dtype=torch.int64), relative_step).nfe


def _corrector(
    name: Corrector | Chain, chains: Chains, relative_step: float | None
) -> Corrector | Move:
    """Returns the corrector for these chains: a name of predictor_corrector, or a `Move`."""
    from ncsn_fast.samplers.correctors import CORRECTORS

    if name not in CORRECTORS:
        return cast(Corrector, name)
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

    NFE follows from the tolerances; the published ones are 1e-5. Rounding costs evaluations: in
    bf16 it takes half as many again as in float32. It draws no noise but its start.
    """
    from ncsn_fast.samplers.ode import probability_flow
    from ncsn_fast.samplers.procedure import Procedure

    ends = _ends("ode", model, levels)
    if not (LEAST_RTOL <= rtol < math.inf and 0 <= atol < math.inf):
        raise ValueError(
            f"expected rtol >= {LEAST_RTOL:.1e} (10 roundings of float32) and atol >= 0; "
            f"got {rtol} and {atol}"
        )

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
    from ncsn_fast.samplers.adaptive import adaptive as solver
    from ncsn_fast.samplers.procedure import Procedure, chains_noise

    ends = _ends("adaptive", model, levels)
    if not (0 <= rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"expected rtol >= 0 and atol > 0; got {rtol} and {atol}")
    if ends[0] == ends[1]:
        raise ValueError("method 'adaptive' has no way to go on a ladder of one level")

    def solve(score: Score, chains: Chains, _: Constrain | None, on_step: OnStep | None) -> Result:
        options: Any = {"rtol": rtol, "atol": atol, "denoise": denoise, "compact": False}
        noise = chains_noise(chains)
        return solver(score, chains.x, *ends[::-1], noise, **options, on_step=on_step)

    return Procedure("adaptive", np.array(ends), None, solve)


def _ends(name: str, model: ScoreModel, levels: Levels) -> tuple[float, float]:
    """Returns the first and last noise level of a method that chooses its steps."""
    if levels.steps is not None:
        raise ValueError(f"method {name!r} chooses its own steps; give rtol and atol instead")
    own = levels.own(model)
    return float(own[0]), float(own[-1])
