"""Sampling methods by name: how a model and a caller's options become a Program or a Procedure."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops import noise
from ncsn_fast.samplers import procedure_methods, program_methods
from ncsn_fast.samplers.level_selection import Levels
from ncsn_fast.samplers.procedure import Procedure
from ncsn_fast.samplers.program import Program

log = logging.getLogger(__name__)

_SPACING = ("sigmas", "schedule", "rho")


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of METHODS.

    Attributes:
        build: (model, levels, options of its own) -> what runs.   source: what it is, and whose.
        levels: which fields of Levels it heeds, beside steps and sigma_start.
    """

    build: Callable[..., Program | Procedure]
    source: str
    levels: tuple[str, ...] = _SPACING

    def options(self) -> list[str]:
        """Names of everything that a caller may choose, beside the steps."""
        parameters = inspect.signature(self.build).parameters.values()
        own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        return [*self.levels, *own, "sigma_start"]


METHODS: dict[str, Method] = {
    "ald": Method(
        program_methods.ald, "annealed Langevin dynamics, Song & Ermon 2019/2020", ("sigmas",)
    ),
    "fast": Method(
        program_methods.fast, "DPM-Solver++(2M) with eta = 4: ald's quality, few evaluations"
    ),
    "cas": Method(
        program_methods.cas,
        "consistent annealed sampling, Jolicoeur-Martineau et al. 2021",
        ("sigmas",),
    ),
    "euler": Method(
        program_methods.euler, "Euler's method on the probability flow; DDIM, Song et al."
    ),
    "heun": Method(program_methods.heun, "Heun's method, with churn; EDM, Karras et al. 2022"),
    "dpmpp": Method(program_methods.dpmpp, "DPM-Solver++(2M), Lu et al. 2022"),
    "em": Method(program_methods.em, "Euler-Maruyama on the reverse SDE, Song et al. 2021", ()),
    "reverse": Method(program_methods.reverse, "reverse diffusion sampling, Song et al. 2021"),
    "ancestral": Method(program_methods.ancestral, "ancestral sampling, Song et al. 2021"),
    "pc": Method(procedure_methods.pc, "predictor-corrector sampling, Song et al. 2021"),
    "ode": Method(
        procedure_methods.ode, "probability flow by adaptive Runge-Kutta, Song et al. 2021", ()
    ),
    "adaptive": Method(
        procedure_methods.adaptive, "adaptive steps on the SDE, Jolicoeur-Martineau et al. 2021", ()
    ),
}


def check_options(method: str, options: Iterable[str]) -> Method:
    """The row of a method; ValueError unless it exists and has these options."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    row = METHODS[method]
    known = row.options()
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"method {method!r} has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return row


def build(
    method: str, model: ScoreModel, steps: int | None, options: dict[str, Any]
) -> Program | Procedure:
    """What a method runs; ValueError names the methods, or options of it, that exist."""
    row = check_options(method, options)
    of_levels = {f.name for f in dataclasses.fields(Levels)} & set(options)
    levels = Levels(steps, **{name: options[name] for name in of_levels})
    own = {name: value for name, value in options.items() if name not in of_levels}
    sampler = row.build(model, levels, **own)
    noise.check_uint32("number of steps", sampler.nfe or 0)
    if model.conditional and not _trained(model, sampler):
        log.warning(
            "this network knows its %d trained sigmas only; others use the nearest of them",
            len(model.sigmas),
        )
    return sampler


def _trained(model: ScoreModel, sampler: Program | Procedure) -> bool:
    """Whether the sampler asks for trained sigmas alone."""
    if sampler.nfe is None:
        return False
    trained = model.sigmas.double().cpu().numpy()
    return bool(np.isclose(sampler.sigma[:, None], trained[None], rtol=1e-4).any(axis=1).all())
