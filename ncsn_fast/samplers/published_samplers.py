"""Published samplers: the methods, steps and options of the papers' tables, by name.

EDM's noise levels are of images in [-1, 1]; here images are in [0, 1], so they are halved. Steps of
None are the network's own N: 1000 or 2000 for those of score_sde.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from ncsn_fast.names import suggestion

if TYPE_CHECKING:  # the command line lists these before torch is imported
    from ncsn_fast.models.score import ScoreModel

Networks = Literal["any", "VE", "VP", "discrete VP"]


@dataclasses.dataclass(frozen=True)
class PublishedSampler:
    """Row of PUBLISHED_SAMPLERS.

    Attributes:
        method: a row of METHODS.   options: of the method.
        source: paper and table or configuration, in words.
        steps: number of noise levels, or of steps in time; None for the model's own.
        networks: kind of the networks that it is of; "VP" includes sub-VP.
    """

    method: str
    options: Mapping[str, Any]
    source: str
    steps: int | None = None
    networks: Networks = "any"


def _edm(steps: int, source: str, **options: float) -> PublishedSampler:
    """Returns a row of EDM: levels with rho 7 from 80 to 0.002, within those of the network."""
    range_ = {"schedule": "karras", "sigma_max": 80 / 2, "sigma_min": 0.002 / 2}
    return PublishedSampler(
        "heun", MappingProxyType({**range_, **options}), f"EDM (Karras et al. 2022), {source}",
        steps,
    )  # fmt: skip


def _score_sde(
    method: str,
    source: str,
    networks: Networks = "any",
    steps: int | None = None,
    **options: Any,
) -> PublishedSampler:
    described = f"score_sde (Song et al. 2021), {source}"
    return PublishedSampler(method, MappingProxyType(options), described, steps, networks)


def _ve_pc(snr: float, source: str) -> PublishedSampler:
    """Returns reverse diffusion after one Langevin step, whose norms are means over the batch."""
    return _score_sde(
        "pc", source, "VE", predictor="reverse_diffusion", corrector="langevin", corrector_steps=1,
        order="corrector_first", snr=snr, norm="batch",
    )  # fmt: skip


PUBLISHED_SAMPLERS: dict[str, PublishedSampler] = {
    "edm-cifar10": _edm(18, "CIFAR-10, 35 evaluations"),
    "edm-ffhq": _edm(40, "FFHQ 64x64, 79 evaluations"),
    "edm-afhqv2": _edm(40, "AFHQv2 64x64, 79 evaluations"),
    "edm-imagenet64": _edm(
        256, "ImageNet 64x64, 511 evaluations", churn=40.0, s_min=0.05 / 2, s_max=50 / 2,
        s_noise=1.003,
    ),
    "ve-pc": _ve_pc(0.16, "VE networks of CIFAR-10, snr 0.16"),
    "ve-pc-celeba": _ve_pc(0.17, "VE network of CelebA 64x64, snr 0.17"),
    "ve-pc-256": _ve_pc(0.075, "VE networks of 256x256 images, snr 0.075"),
    "ve-pc-1024": _ve_pc(0.15, "VE networks of 1024x1024 images, snr 0.15"),
    "vp-pc": _score_sde(
        "em", "VP and sub-VP networks: Euler-Maruyama without a corrector", "VP", 1000, t_end=1e-3
    ),
    "vp-ancestral": _score_sde(
        "ancestral", "VP networks of DDPM's chain, noise of variance beta", "discrete VP",
        schedule="ladder", variance="forward",
    ),
    "reverse-diffusion": _score_sde(
        "reverse", "VE networks, without a corrector", "VE", schedule="ladder"
    ),
    "ancestral": _score_sde(
        "ancestral", "VE networks, without a corrector", "VE", schedule="ladder"
    ),
    "probability-flow": _score_sde("ode", "RK45 with tolerance 1e-5", rtol=1e-5, atol=1e-5),
}  # fmt: skip


def published_sources() -> str:
    """Returns the names and sources of all rows, for help texts."""
    return "; ".join(f"{name}: {row.source}" for name, row in PUBLISHED_SAMPLERS.items())


def resolve(
    name: str, method: Any, steps: int | None, options: Mapping[str, Any]
) -> tuple[str, int | None, dict[str, Any]]:
    """Returns method, steps and options of a published sampler, changed by those that are given.

    Args:
        method: the row's, or the default of all calls.
        options: those that are given; noise levels as sigmas replace all that set the levels.

    Raises:
        ValueError: an unknown name, or another method.
    """
    from ncsn_fast.samplers import methods

    row = PUBLISHED_SAMPLERS.get(name)
    if row is None:
        raise ValueError(
            f"published must be one of {', '.join(PUBLISHED_SAMPLERS)}; got {name!r}"
            f"{suggestion(name, PUBLISHED_SAMPLERS)}"
        )
    if method not in (methods.DEFAULT, row.method):
        raise ValueError(
            f"the published sampler {name} is of method {row.method!r}; got method {method!r}: "
            "leave one of the two out"
        )
    own = dict(row.options)
    if options.get("sigmas") is not None:
        own = {key: value for key, value in own.items() if key not in methods.LEVEL_OPTIONS}
        return row.method, steps, {**own, **options}
    return row.method, row.steps if steps is None else steps, {**own, **options}


def check_network(name: str, model: ScoreModel) -> None:
    """Raises ValueError unless a published sampler is of networks like the model's."""
    from ncsn_fast.diffusion.parameterisation import DiscreteVP
    from ncsn_fast.diffusion.sde import VP

    process = model.parameterisation.process
    discrete = isinstance(process, DiscreteVP)
    found = "discrete VP" if discrete else "VP" if isinstance(process, VP) else "VE"
    wanted = PUBLISHED_SAMPLERS[name].networks
    if wanted not in ("any", found):
        fit = [key for key, row in PUBLISHED_SAMPLERS.items() if row.networks in ("any", found)]
        raise ValueError(
            f"the published sampler {name} is of {wanted} networks, and this model's is {found}; "
            f"take one of {', '.join(fit)}"
        )
