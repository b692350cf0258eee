"""Builders of the methods that are tables: from a model, levels and options to a Program.

Each imports what it builds with when it is called: the command line reads their signatures before
torch is imported.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, cast

import numpy as np

from ncsn_fast.notices import notice
from ncsn_fast.samplers.choices import Form, Variance

if TYPE_CHECKING:
    from ncsn_fast.models.score import ScoreModel
    from ncsn_fast.samplers.level_selection import Levels
    from ncsn_fast.samplers.program import Column, Program

log = logging.getLogger(__name__)


def ald(
    model: ScoreModel,
    levels: Levels,
    *,
    epsilon: float | None = None,
    n_steps_each: int | None = None,
    denoise: bool = True,
    form: Form | None = None,
) -> Program:
    """Annealed Langevin dynamics: `steps` noise levels, NFE = steps * n_steps_each (+ 1).

    The default of epsilon is the model's own. For another ladder or n_steps_each it follows from
    Technique 4, and for a ladder of one level from the model's in proportion to sigma^2.
    """
    from ncsn_fast.samplers.langevin import annealed_langevin

    config = model.config
    ladder = levels.like_the_model(model)
    t = config.n_steps_each if n_steps_each is None else n_steps_each
    chosen = form or cast(Form, config.langevin_form)
    if epsilon is None:
        epsilon = _epsilon(model, levels, ladder, t, chosen)
    return annealed_langevin(ladder, epsilon, t, denoise=denoise, form=chosen)


def _epsilon(
    model: ScoreModel, levels: Levels, ladder: Column, n_steps_each: int, form: str
) -> float:
    """Returns the model's own step on its own ladder, else the step of Technique 4."""
    from ncsn_fast.diffusion.schedule import epsilon_for

    config, own = model.config, levels.own(model)
    same = len(ladder) == len(own) and np.allclose(ladder, own, rtol=1e-5)
    if n_steps_each < 1 or (same and n_steps_each == config.n_steps_each):
        return config.epsilon
    if len(ladder) == 1:  # no ratio to go by
        epsilon = config.epsilon * float(ladder[-1] / own[-1]) ** 2
    else:  # Technique 4 speaks of the code's form; the paper's halves its step
        epsilon = epsilon_for(ladder, n_steps_each) * (2 if form == "paper" else 1)
    notice(log, "epsilon %.4g for this ladder", epsilon)
    return epsilon


def cas(
    model: ScoreModel,
    levels: Levels,
    *,
    n_sigma: int = 1,
    epsilon: float | None = None,
    denoise: bool = True,
) -> Program:
    """Consistent annealed sampling: `steps` noise levels, each step between two cut into `n_sigma`.

    NFE = (steps - 1) * n_sigma + 1. The step is eta = epsilon / sigma_L^2; None follows the
    released CIFAR-10 one.
    """
    from ncsn_fast.samplers.langevin import consistent_annealed, refine_ladder

    ladder = refine_ladder(levels.like_the_model(model), n_sigma)
    return consistent_annealed(
        ladder, None if epsilon is None else epsilon / ladder[-1] ** 2, denoise=denoise
    )


def euler(
    model: ScoreModel,
    levels: Levels,
    *,
    churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    denoise: bool = True,
) -> Program:
    """Euler's method on the probability flow (DDIM): `steps` levels, NFE = steps.

    churn, s_min, s_max, s_noise: as in `heun`.
    """
    from ncsn_fast.samplers import few_step as few

    ladder = levels.between_the_ends(model)
    added = few.Churn(churn, s_min, s_max, s_noise, model.parameterisation.nearest_levels)
    return few.euler(ladder, churn=added, denoise=denoise)


def heun(
    model: ScoreModel,
    levels: Levels,
    *,
    churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    denoise: bool = True,
) -> Program:
    """Heun's method on the probability flow (EDM): `steps` levels, NFE = 2 steps - 1.

    churn is S_churn. The paper's sigmas are of images in [-1, 1]; here images are in [0, 1], so its
    S_min and S_max, and its sigmas, are to be halved.
    """
    from ncsn_fast.samplers import few_step as few

    ladder = levels.between_the_ends(model)
    added = few.Churn(churn, s_min, s_max, s_noise, model.parameterisation.nearest_levels)
    return few.heun(ladder, churn=added, denoise=denoise)


def dpmpp(
    model: ScoreModel,
    levels: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    denoise: bool = True,
) -> Program:
    """DPM-Solver++(2M), by default its SDE variant (eta = 1): `steps` levels, NFE = steps.

    NCSNv2 networks are not told the noise level, so a flow never mends one that it has missed;
    fresh noise does. Of the digits model's samples at 20 steps, 84 % are recognised with eta = 1
    and 64 % with eta = 0; euler and heun without churn are flows, too (benchmarks/quality.py).
    """
    from ncsn_fast.samplers import few_step as few

    ladder = levels.between_the_ends(model)
    return few.dpm_solver_pp(ladder, eta=eta, s_noise=s_noise, denoise=denoise)


def fast(
    model: ScoreModel,
    levels: Levels,
    *,
    eta: float | None = None,
    s_noise: float = 1.0,
    denoise: bool = True,
) -> Program:
    """DPM-Solver++(2M) with the quality of `ald`: `steps` levels, NFE = steps (few_step.py).

    A model that was tuned (`python -m ncsn_fast.tune`) brings a table of its own, which is used
    unless the options ask for another: other steps or levels, or an eta or s_noise.
    """
    from ncsn_fast.samplers import few_step as few

    if model.tuned is not None:
        asked = levels.beside(model.tuned.steps)
        if not asked:
            return few.tuned(model.tuned, denoise=denoise)
        log.warning(
            "this model's tuned table has %d steps and takes no %s: method fast runs its default "
            "table",
            model.tuned.steps, ", ".join(asked),
        )  # fmt: skip
    return few.fast(levels.between_the_ends(model), eta=eta, s_noise=s_noise, denoise=denoise)


def em(model: ScoreModel, levels: Levels, *, t_end: float = 1e-3, denoise: bool = True) -> Program:
    """Euler-Maruyama on the model's reverse SDE: `steps` equal steps of time, NFE = steps.

    It is the VP- or sub-VP-SDE that the network was trained on, else the VE-SDE of its levels.
    """
    from ncsn_fast.diffusion.sde import VE, VP
    from ncsn_fast.samplers.reverse_sde import euler_maruyama, in_ve_form

    own, known = levels.own(model), model.parameterisation
    steps = next(n for n in (levels.steps, levels.usual, len(own)) if n is not None)
    if not isinstance(known.process, VP):
        return euler_maruyama(VE.from_sigmas(own), steps, t_end=t_end, denoise=denoise)
    if levels.sigma_start is not None:
        raise ValueError(
            "method 'em' starts at time 1 of a VP-SDE; take method reverse or ancestral, which can "
            "start at another noise level"
        )
    program = euler_maruyama(known.process, steps, t_end=t_end, denoise=denoise)
    scale = known.process.mean_scale(np.linspace(1.0, t_end, steps))
    return in_ve_form(program, scale, known, model.image_shape)


def reverse(
    model: ScoreModel,
    levels: Levels,
    *,
    flow: bool = False,
    denoise: bool = True,
) -> Program:
    """Reverse diffusion sampling: `steps` levels, NFE = steps.

    Meant for many levels, or with a corrector: its steps overshoot in variance, of first order.
    """
    from ncsn_fast.samplers import reverse_sde as chains

    ladder = levels.between_the_ends(model)
    return chains.reverse_diffusion(ladder, flow=flow, denoise=denoise)


def ancestral(
    model: ScoreModel,
    levels: Levels,
    *,
    eta: float = 1.0,
    variance: Variance = "posterior",
    denoise: bool = True,
) -> Program:
    """Ancestral sampling: `steps` levels, NFE = steps.

    The variance of a step's noise is that of its posterior or, with "forward", that of the chain's
    forward step: beta_i of DDPM, for networks that were trained on a VP chain.
    """
    from ncsn_fast.diffusion.parameterisation import DiscreteVP
    from ncsn_fast.diffusion.sde import VP
    from ncsn_fast.samplers import reverse_sde as chains

    ladder, known = levels.between_the_ends(model), model.parameterisation
    if variance == "posterior":
        return chains.ancestral(ladder, eta, denoise=denoise)
    if variance != "forward" or eta != 1:
        raise ValueError(
            f"variance must be 'posterior' or, with eta 1, 'forward'; got {variance!r}, eta {eta}"
        )
    vp = isinstance(known.process, VP | DiscreteVP)
    scale = known.data_scale if vp else 0.0
    return chains.forward_ancestral(ladder, scale, denoise=denoise)
