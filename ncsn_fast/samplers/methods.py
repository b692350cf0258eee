"""Tables of the sampling methods and their options; builds a method for a model."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import operator
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ncsn_fast.diffusion.spacing import KARRAS_RHO, POLYNOMIAL_RHO
from ncsn_fast.names import suggestion
from ncsn_fast.samplers import k_diffusion, procedure_methods, program_methods
from ncsn_fast.samplers.choices import FAST_STEPS, SNR
from ncsn_fast.samplers.level_selection import Levels

if TYPE_CHECKING:  # the command line lists methods and options before torch is imported
    from ncsn_fast.models.score import ScoreModel
    from ncsn_fast.samplers.procedure import Procedure
    from ncsn_fast.samplers.program import Program

log = logging.getLogger(__name__)

_SPACING = ("sigmas", "schedule", "rho", "sigma_min", "sigma_max")
LEVEL_OPTIONS = (*_SPACING, "sigma_start")
_OF_LEVELS = inspect.signature(Levels).parameters
_TYPES_OF_LEVELS = typing.get_type_hints(Levels)
DEFAULT = "ald"  # the method of calls that name none
BY_TOLERANCE = "by the tolerances"
Choice = str | Callable[..., Any]  # a row of METHODS, or a function in the form of k-diffusion


@dataclasses.dataclass(frozen=True)
class Method:
    """Row of METHODS.

    Attributes:
        build: (model, levels, *, options) -> Program or Procedure. Its keyword-only parameters are
            the method's options; each needs a default here and a row of OPTIONS.
        source: full name and paper.
        levels: fields of Levels that the method uses, beside steps and sigma_start.
        steps: default number of noise levels, or where it comes from, in words.
    """

    build: Callable[..., Program | Procedure]
    source: str
    levels: tuple[str, ...] = _SPACING
    steps: int | str = "the model's own"

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Options of the method by name, as parameters of a function."""
        own = inspect.signature(self.build).parameters.values()
        names = {
            **{name: _OF_LEVELS[name] for name in self.levels},
            **{p.name: p for p in own if p.kind is p.KEYWORD_ONLY},
        }
        return {**names, "sigma_start": _OF_LEVELS["sigma_start"]}

    @functools.cached_property
    def types(self) -> dict[str, Any]:
        """Types of the options by name."""
        own = {name: p.annotation for name, p in inspect.signature(self.build).parameters.items()}
        hints = types.SimpleNamespace(
            __annotations__={name: own[name] for name in self.parameters.keys() & own.keys()}
        )
        return {**typing.get_type_hints(hints, self.build.__globals__), **_TYPES_OF_LEVELS}


@dataclasses.dataclass(frozen=True)
class Option:
    """Row of OPTIONS.

    Attributes:
        help: one or two sentences, with the unit.
        unset: meaning of a default of None, in words.
        command_line: whether the commands have the option.
    """

    help: str
    unset: str = "the method's own"
    command_line: bool = True


METHODS: dict[str, Method] = {
    "ald": Method(
        program_methods.ald, "annealed Langevin dynamics (Song & Ermon 2019, 2020)", ("sigmas",)
    ),
    "fast": Method(
        program_methods.fast,
        "quality of ald in few evaluations, by DPM-Solver++(2M) with more noise",
        steps=FAST_STEPS,
    ),
    "cas": Method(
        program_methods.cas,
        "consistent annealed sampling (Jolicoeur-Martineau et al. 2021)",
        ("sigmas",),
    ),
    "euler": Method(
        program_methods.euler,
        "Euler's method on the probability flow (DDIM, Song et al. 2021)",
        steps=50,
    ),
    "heun": Method(
        program_methods.heun,
        "Heun's method on the probability flow, with churn (EDM, Karras et al. 2022)",
        steps=18,
    ),
    "dpmpp": Method(program_methods.dpmpp, "DPM-Solver++(2M) (Lu et al. 2022)", steps=20),
    "em": Method(
        program_methods.em, "Euler-Maruyama on the reverse SDE (Song et al. 2021)", (), steps=500
    ),
    "reverse": Method(program_methods.reverse, "reverse diffusion sampling (Song et al. 2021)"),
    "ancestral": Method(program_methods.ancestral, "ancestral sampling (Song et al. 2021)"),
    "pc": Method(procedure_methods.pc, "predictor-corrector sampling (Song et al. 2021)"),
    "ode": Method(
        procedure_methods.ode,
        "probability flow by adaptive Runge-Kutta (Song et al. 2021)",
        (),
        steps=BY_TOLERANCE,
    ),
    "adaptive": Method(
        procedure_methods.adaptive,
        "adaptive steps on the reverse SDE (Jolicoeur-Martineau et al. 2021)",
        (),
        steps=BY_TOLERANCE,
    ),
}

# Help texts only: the methods that have an option, its type and its defaults follow from METHODS.
OPTIONS: dict[str, Option] = {
    "sigmas": Option(
        "All noise levels, descending, in place of steps, schedule, rho and sigma_start.",
        unset="by the other options",
        command_line=False,
    ),
    "schedule": Option(
        "Spacing of the levels: trained levels (ladder), geometric, or by rho (karras, "
        "polynomial).",
        unset="geometric, or trained levels if the network needs them,",
    ),
    "rho": Option(
        "Exponent of the schedule karras or polynomial.",
        unset=f"{KARRAS_RHO:g} with karras and {POLYNOMIAL_RHO:g} with polynomial",
    ),
    "sigma_min": Option(
        "Smallest noise level, in units of the image range [0, 1]; the model's own if that is "
        "larger.",
        unset="the model's own",
    ),
    "sigma_max": Option(
        "Largest noise level, in units of the image range [0, 1]; the model's own if that is "
        "smaller.",
        unset="the model's own",
    ),
    "n_steps_each": Option("Langevin steps per level.", unset="the model's own"),
    "n_sigma": Option("Number of steps between two levels."),
    "epsilon": Option(
        "Langevin step size (the published step_lr). For levels other than the model's, ald "
        "computes it by Technique 4.",
        unset="the published one",
    ),
    "form": Option(
        "Form of the Langevin step: x + a s + sqrt(2a) z (code), or the same with a / 2 (paper).",
        unset="the model's own",
    ),
    "eta": Option(
        "Amount of noise: 0 for the probability flow, 1 for the SDE; more is possible.",
        unset="that of the rows of a fitted table",
    ),
    "variance": Option(
        "Variance of the noise of an ancestral step: of the posterior, or of the forward step "
        "(the two of DDPM; the published one is the latter for VP networks)."
    ),
    "churn": Option("S_churn of EDM: noise added before a step."),
    "s_min": Option("Smallest sigma that churn acts on, in units of the image range [0, 1]."),
    "s_max": Option("Largest sigma that churn acts on, in units of the image range [0, 1]."),
    "s_noise": Option("Scale of the noise."),
    "t_end": Option("Time of the last step, from 0 to 1."),
    "predictor": Option("Predictor of the step from one level to the next."),
    "corrector": Option(
        "Corrector at each level: the published langevin and annealed, or a Markov chain."
    ),
    "corrector_steps": Option("Corrector steps at each level."),
    "order": Option("Order of predictor and corrector at a level."),
    "snr": Option(
        "Signal-to-noise ratio of the step of correctors langevin and annealed.", unset=f"{SNR:g}"
    ),
    "relative_step": Option(
        "Step of correctors ula, mala and hmc, in units of sigma.",
        unset="by corrector and image size (samplers/correctors.py)",
    ),
    "norm": Option(
        "Norms that set the step of corrector langevin: of each sample, or means over the "
        "micro-batch, as published.",
        unset="sample",
    ),
    "rtol": Option("Relative tolerance of a step."),
    "atol": Option("Absolute tolerance of a step, in units of the image range [0, 1]."),
    "denoise": Option(
        "Return the posterior mean at the last level instead of a noisy sample (pc: omit the last "
        "noise)."
    ),
    "flow": Option("Follow the probability flow instead of the SDE.", command_line=False),
    "sigma_start": Option(
        "Noise level to start at.", unset="the model's first", command_line=False
    ),
}


def options() -> list[str]:
    """Returns the names of the options of all methods, in the order of OPTIONS.

    Raises:
        ValueError: an option of a method has no row in OPTIONS.
    """
    used = {name: method for method, row in METHODS.items() for name in row.parameters}
    for name, method in used.items():
        if name not in OPTIONS:
            raise ValueError(
                f"option {name} of method {method!r} has no help text; give it a row of OPTIONS in "
                "samplers/methods.py"
            )
    return [name for name in OPTIONS if name in used]


def methods_with(option: str) -> dict[str, inspect.Parameter]:
    """Returns the methods that have an option, each with its parameter."""
    return {
        method: row.parameters[option]
        for method, row in METHODS.items()
        if option in row.parameters
    }


def option_type(option: str) -> Any:
    """Returns the type of an option; a union if methods differ."""
    return functools.reduce(
        operator.or_, [METHODS[method].types[option] for method in methods_with(option)]
    )


def default_steps() -> str:
    """Returns the default number of steps of every method, in words."""
    return _by_value({method: row.steps for method, row in METHODS.items()})


def defaults(option: str) -> str:
    """Returns the defaults of an option and the methods that have them, in words."""
    unset = OPTIONS[option].unset
    return _by_value(
        {
            method: unset if parameter.default is None else parameter.default
            for method, parameter in methods_with(option).items()
        }
    )


def _by_value(values: Mapping[str, object]) -> str:
    """Groups methods by value: "4 for fast; 1 for dpmpp, ancestral"."""
    names: dict[str, list[str]] = {}
    for method, value in values.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        names.setdefault(text, []).append(method)
    return "; ".join(
        f"{text} for {'all methods' if len(those) == len(METHODS) else ', '.join(those)}"
        for text, those in names.items()
    )


def parameters() -> list[inspect.Parameter]:
    """Returns the options of all methods as keyword parameters; default ... if methods differ."""
    found = []
    for option in options():
        first, *others = methods_with(option).values()
        common = all(other.default == first.default for other in others)
        found.append(
            first.replace(kind=first.KEYWORD_ONLY, default=first.default if common else ...)
        )
    return found


def describe_options() -> str:
    """Returns a docstring's paragraphs on every option, its methods and their defaults."""
    return "\n".join(
        textwrap.fill(
            f"{option}: {OPTIONS[option].help} (default: {defaults(option)})",
            width=92,
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
        )
        for option in options()
    )


def check_options(method: str, options: Iterable[str]) -> Method:
    """Returns the row of a method; ValueError unless it exists and has these options."""
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}; got {method!r}"
            f"{suggestion(method, METHODS)}"
        )
    row = METHODS[method]
    known = row.parameters
    unknown = sorted(set(options) - known.keys())
    if unknown:
        near = suggestion(unknown[0], (*known, "seed", "start", "steps"))
        raise ValueError(
            f"method {method!r} has no option {', '.join(unknown)}{near}; it has {', '.join(known)}"
        )
    return row


def build(
    method: Choice, model: ScoreModel, steps: int | None, options: dict[str, Any]
) -> Program | Procedure:
    """Builds a method for a model; ValueError names the existing methods, or the options."""
    from ncsn_fast.ops import noise

    of_levels = {name: options[name] for name in LEVEL_OPTIONS if name in options}
    own = {name: value for name, value in options.items() if name not in of_levels}
    if callable(method):
        levels = Levels(steps, usual=k_diffusion.STEPS, **of_levels)
        sampler: Program | Procedure = k_diffusion.procedure(method, model, levels, own)
    else:
        row = check_options(method, options)
        usual = row.steps if isinstance(row.steps, int) else None
        given = tuple(name for name, value in options.items() if value is not None)
        levels = Levels(steps, usual=usual, given=given, **of_levels)
        for name, value in own.items():
            if row.types[name] in (int, int | None) and value is not None:
                noise.check_integer(name, value)
        sampler = row.build(model, levels, **own)
    noise.check_uint32("number of steps", sampler.nfe or 0)
    if model.conditional and not _trained(model, sampler):
        log.warning(
            "this network knows its %d trained sigmas only; others use the nearest of them",
            len(model.sigmas),
        )
    return sampler


def _trained(model: ScoreModel, sampler: Program | Procedure) -> bool:
    """Returns whether the sampler evaluates the network at trained sigmas only."""
    if sampler.nfe is None:
        return False
    trained = model.sigmas.double().cpu().numpy()
    return bool(np.isclose(sampler.sigma[:, None], trained[None], rtol=1e-4).any(axis=1).all())
