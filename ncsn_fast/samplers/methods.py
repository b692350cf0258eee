"""Sampling methods by name: how each turns a model and a caller's options into a Program."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ncsn_fast import sigmas as ladders
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.samplers.langevin import annealed_langevin, consistent_annealed, refine_ladder
from ncsn_fast.samplers.program import Column, Program, check_steps

log = logging.getLogger(__name__)


def _ladder(model: ScoreModel, steps: int | None, sigmas: ArrayLike | None) -> Column:
    """The caller's ladder, else the model's own, re-spaced geometrically if `steps` differs."""
    if sigmas is not None:
        if steps is not None:
            raise ValueError("give either steps or sigmas, not both")
        return ladders.check_ladder(np.asarray(sigmas))
    own = model.sigmas.double().cpu().numpy()
    if steps is None or steps == len(own):
        return own
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    return np.geomspace(own[0], own[-1], steps)


def ald(
    model: ScoreModel,
    steps: int | None = None,
    *,
    sigmas: ArrayLike | None = None,
    epsilon: float | None = None,
    n_steps_each: int | None = None,
    denoise: bool = True,
    form: Literal["code", "paper"] | None = None,
) -> Program:
    """Annealed Langevin dynamics: `steps` noise levels, NFE = steps * n_steps_each (+ 1).

    A ladder or n_steps_each other than the model's own gets its epsilon from Technique 4, one level
    the model's in proportion, unless one is given.
    """
    config = model.config
    ladder = _ladder(model, steps, sigmas)
    t = config.n_steps_each if n_steps_each is None else n_steps_each
    chosen = form or config.langevin_form
    if epsilon is None:
        epsilon = _epsilon(model, ladder, t, chosen)
    return annealed_langevin(ladder, epsilon, t, denoise=denoise, form=chosen)  # type: ignore[arg-type]


def _epsilon(model: ScoreModel, ladder: Column, n_steps_each: int, form: str) -> float:
    """The model's own step on its own ladder, else Technique 4's."""
    config, own = model.config, model.sigmas.double().cpu().numpy()
    same = len(ladder) == len(own) and np.allclose(ladder, own, rtol=1e-5)
    if n_steps_each < 1 or (same and n_steps_each == config.n_steps_each):
        return config.epsilon
    if len(ladder) == 1:  # no ratio to go by
        epsilon = config.epsilon * float(ladder[-1] / own[-1]) ** 2
    else:  # Technique 4 speaks of the code's form; the paper's halves its step
        epsilon = ladders.epsilon_for(ladder, n_steps_each) * (2 if form == "paper" else 1)
    log.info("epsilon %.4g for this ladder", epsilon)
    return epsilon


def cas(
    model: ScoreModel,
    steps: int | None = None,
    *,
    sigmas: ArrayLike | None = None,
    n_sigma: int = 1,
    epsilon: float | None = None,
    denoise: bool = True,
) -> Program:
    """Consistent annealed sampling: `steps` noise levels, each step between two cut into `n_sigma`.

    NFE = (steps - 1) * n_sigma + 1. The step is eta = epsilon / sigma_L^2; None follows the
    released CIFAR-10 one.
    """
    ladder = refine_ladder(_ladder(model, steps, sigmas), n_sigma)
    return consistent_annealed(
        ladder, None if epsilon is None else epsilon / ladder[-1] ** 2, denoise=denoise
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of METHODS."""

    build: Callable[..., Program]
    source: str


METHODS: dict[str, Method] = {
    "ald": Method(ald, "annealed Langevin dynamics, Song & Ermon 2019/2020"),
    "cas": Method(cas, "consistent annealed sampling, Jolicoeur-Martineau et al. 2021"),
}


def build(method: str, model: ScoreModel, steps: int | None, options: dict[str, Any]) -> Program:
    """The program of a method; ValueError names the methods, or options of it, that exist."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    function = METHODS[method].build
    known = [
        p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"method {method!r} has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    program = function(model, steps, **options)
    check_steps(program)
    trained = model.sigmas.double().cpu().numpy()
    if (
        model.conditional
        and not np.isclose(program.sigma[:, None], trained[None], rtol=1e-4).any(axis=1).all()
    ):
        log.warning(
            "this network knows its %d trained sigmas only; others use the nearest of them",
            len(trained),
        )
    return program
