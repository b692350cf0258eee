"""Tables of the networks: what the modules are built from, and which images they take.

They are apart from the modules, because the command line reads them before torch is imported.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stage:
    """Two residual blocks, `width` in units of ngf; the first halves the resolution or dilates."""

    name: str
    width: int
    down: bool = False
    dilation: int = 1


@dataclasses.dataclass(frozen=True)
class Refine:
    """RefineNet block that fuses stage `skip` with the previous block; `width` in units of ngf."""

    name: str
    skip: str
    width: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Stages from fine to coarse, and refine blocks in the order they run.

    In a conditional architecture the norms depend on the level.
    """

    stages: tuple[Stage, ...]
    refines: tuple[Refine, ...]
    conditional: bool = False

    @property
    def size_multiple(self) -> int:
        """Number that image height and width must be a multiple of: 2 per halving stage."""
        return 2 ** sum(stage.down and stage.dilation == 1 for stage in self.stages)


_BASE = Architecture(
    stages=(
        Stage("res1", 1),
        Stage("res2", 2, down=True),
        Stage("res3", 2, down=True, dilation=2),
        Stage("res4", 2, down=True, dilation=4),
    ),
    refines=(
        Refine("refine1", "res4", 2),
        Refine("refine2", "res3", 2),
        Refine("refine3", "res2", 1),
        Refine("refine4", "res1", 1),
    ),
)
_DEEPER = Architecture(
    stages=(
        Stage("res1", 1),
        Stage("res2", 2, down=True),
        Stage("res3", 2, down=True),
        Stage("res4", 4, down=True, dilation=2),
        Stage("res5", 4, down=True, dilation=4),
    ),
    refines=(
        Refine("refine1", "res5", 4),
        Refine("refine2", "res4", 2),
        Refine("refine3", "res3", 2),
        Refine("refine4", "res2", 1),
        Refine("refine5", "res1", 1),
    ),
)
_DEEPEST = Architecture(
    stages=(*_DEEPER.stages[:3], Stage("res31", 2, down=True), *_DEEPER.stages[3:]),
    refines=(*_DEEPER.refines[:2], Refine("refine31", "res31", 2), *_DEEPER.refines[2:]),
)

ARCHITECTURES: dict[str, Architecture] = {
    "ncsnv2": _BASE,
    "ncsnv2_deeper": _DEEPER,
    "ncsnv2_deepest": _DEEPEST,
    "ncsn": dataclasses.replace(_BASE, conditional=True),
    "ncsn_deeper": dataclasses.replace(_DEEPER, conditional=True),
}


@dataclasses.dataclass(frozen=True)
class Version:
    """Differences between the public versions.

    Attributes:
        fourier_scale: standard deviation of the frequencies of the time's Fourier features.
        linear: whether a linear layer follows the Fourier features.
        diffusion_is_sigma: dx = sigma(t) dw; else dx = g dw with g^2 = d sigma^2 / dt.
        sigma_min, sigma_max: the published sigma(t) = sigma_min (sigma_max / sigma_min)^t.
        t_min: training draws t uniformly from (t_min, 1).
        adds_skips: the decoder adds the encoder's maps to its own; else it concatenates them.
    """

    fourier_scale: float
    linear: bool
    diffusion_is_sigma: bool
    sigma_min: float
    sigma_max: float
    t_min: float
    adds_skips: bool = False


VERSIONS: dict[str, Version] = {
    # GANs-Public, optional notebook of course 2, week 2
    "a": Version(8.0, False, False, sigma_min=0.01, sigma_max=22.0, t_min=1e-3),
    # Yang Song's notebook
    "b": Version(30.0, True, True, sigma_min=1.0, sigma_max=25.0, t_min=1e-5),
    # its variant in many later notebooks, whose embedding is called time_embed
    "c": Version(30.0, True, True, sigma_min=1.0, sigma_max=25.0, t_min=1e-5, adds_skips=True),
}
TIME_ARCHS: dict[str, str] = {f"unet_{version}": version for version in VERSIONS}
# Time-conditioned networks have a fixed activation and norm.
TIME_STYLE: dict[str, Any] = {"act": "swish", "norm": "GroupNorm", "scale_input": False}


def size_rule(arch: str) -> tuple[int, int]:
    """Returns (a, b) of the heights and widths a k + b that an architecture's networks take."""
    return (8, 4) if arch in TIME_ARCHS else (ARCHITECTURES[arch].size_multiple, 0)


def check_unet_size(height: int, width: int) -> None:
    """Raises ValueError unless the decoder's maps have the same sizes as the encoder's."""
    if min(height, width) < 28 or height % 8 != 4 or width % 8 != 4:
        raise ValueError(
            f"this network takes images whose height and width are 28, 36, 44, ... (4 more than a "
            f"multiple of 8); got {height}x{width}. Resize or pad them."
        )


def check_image_size(arch: str, height: int, width: int) -> None:
    """Raises ValueError unless the networks of an architecture take images of this size."""
    if arch in TIME_ARCHS:
        check_unet_size(height, width)
        return
    multiple = ARCHITECTURES[arch].size_multiple
    if height % multiple or width % multiple:
        raise ValueError(
            f"image_size must be multiples of {multiple} for {arch}; got {height}x{width}"
        )
