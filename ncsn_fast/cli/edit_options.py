"""Options of `python -m ncsn_fast.edit`, a class for each of its commands."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from ncsn_fast.cli import command
from ncsn_fast.cli.options import (
    ClassOptions,
    ModelOptions,
    SamplingOptions,
    check_count,
    check_gif,
    check_png,
    check_positive,
    own_options_first,
)
from ncsn_fast.data.decode import parse_colour


@dataclasses.dataclass(frozen=True)
class Drawing(SamplingOptions):
    """Options of all commands that draw samples."""

    out: Path = Path("edited.png")
    """Grid to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_png("--out", self.out)


@dataclasses.dataclass(frozen=True)
class Animated(Drawing):
    """Options of all commands whose chains are one for each result."""

    animate: Path | None = None
    """GIF of the chains on their way from noise to the results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gif("--animate", self.animate)


@dataclasses.dataclass(frozen=True)
class OfImages(Animated, ClassOptions):
    """Options of all commands that start from images."""

    images: str = "digits"
    """One image file, images in any format of train --data, or digits (held-out ones that no
    training saw)."""
    n: int = 8
    """Number of images."""
    background: str = "white"
    """Colour below the transparent pixels of images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--n", self.n)
        parse_colour(self.background)


@own_options_first
@dataclasses.dataclass(frozen=True)
class Inpaint(OfImages):
    """Fill in unknown pixels. Rows of the grid: original, known pixels, result."""

    mask: str = "left"
    """Known pixels: left, right, top, bottom (half), centre (square), or an image file, white
    and opaque where known."""
    variant: Literal["ncsnv2", "ncsn", "projected"] | None = None
    """How known pixels are imposed: as published in 2020 or 2019, or by projecting the score.
    Default: ncsnv2, or projected for methods that cannot impose pixels (ode, adaptive)."""


@dataclasses.dataclass(frozen=True)
class Measured(OfImages):
    """Options of all commands that restore images from measurements of them."""

    given: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The images are measurements already and are not measured first; no row of originals."""
    noise: float = 0.0
    """Standard deviation of the noise on the measurements, in units of the image range [0, 1]; it
    is added, unless the images are --given."""
    how: Literal["imposed", "projected"] | None = None
    """Impose the measurements at every step, or project the score on them. Default: imposed, but
    projected with noise and for methods that cannot impose them (ode, adaptive)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"--noise must be at least 0 and finite; got {self.noise}")


@own_options_first
@dataclasses.dataclass(frozen=True)
class Colourise(Measured):
    """Colour grey images. Rows of the grid: original, mean of its channels, result."""


@own_options_first
@dataclasses.dataclass(frozen=True)
class SuperResolve(Measured):
    """Enlarge images. Rows of the grid: original, means of blocks of pixels, result."""

    factor: int = 4
    """How many times larger height and width become."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--factor", self.factor)


@own_options_first
@dataclasses.dataclass(frozen=True)
class Deblur(Measured):
    """Sharpen images that a Gaussian has blurred. Rows of the grid: original, blurred, result."""

    blur: float = 2.0
    """Standard deviation of the Gaussian, in pixels of the model's images."""
    noise: float = 0.02
    """Standard deviation of the noise on the blurred images, in units of the image range [0, 1]; it
    is added, unless the images are --given. 8 bits alone are 0.001."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("--blur", self.blur)


@own_options_first
@dataclasses.dataclass(frozen=True)
class SDEdit(OfImages):
    """Vary images: add noise and sample from there. Rows of the grid: original, noisy, result."""

    strength: float | None = None
    """How much of the ladder is run, from 0 to 1, in log sigma (default 0.5)."""
    sigma: float | None = None
    """In its place, the noise level to start at; the nearest of the model's ladder is taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength is not None and self.sigma is not None:
            raise ValueError("give either --strength or --sigma, not both")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ValueError(f"--strength must be in [0, 1]; got {self.strength}")
        if self.sigma is not None:
            check_positive("--sigma", self.sigma)


@own_options_first
@dataclasses.dataclass(frozen=True)
class Guide(Animated):
    """Draw samples of classes.

    Rows of the grid: samples of any class, then a row for each label, of the same noise.
    """

    classifier: str = ""
    """MODULE:NAME, a Python function of yours: (x (B, C, H, W), sigma (B,)) -> logits (B, K), of a
    classifier of noisy images."""
    labels: tuple[int, ...] = (0,)
    """Classes, counted from 0."""
    n: int = 8
    """Samples of each class."""
    scale: float = 1.0
    """Weight of the classifier's gradient: 1 is Bayes' rule, more sharpens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--n", self.n)
        if not all(self.classifier.partition(":")):
            raise ValueError(f"--classifier must be MODULE:NAME; got {self.classifier!r}")
        if min(self.labels, default=-1) < 0:
            raise ValueError(f"--labels must be at least one, from 0 on; got {self.labels}")


@own_options_first
@dataclasses.dataclass(frozen=True)
class Interpolate(Drawing, ClassOptions):
    """Rows of frames between two samples."""

    pairs: int = 4
    """Number of rows."""
    frames: int = 10
    """Frames per row."""
    out: Path = Path("interpolated.png")
    """Grid to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--pairs", self.pairs)
        check_count("--frames", self.frames)


@own_options_first
@dataclasses.dataclass(frozen=True)
class Denoise(ModelOptions):
    """Add noise, then remove it (Tweedie). Rows of the grid: original, noisy, denoised."""

    images: str = "digits"
    """One image file, images in any format of train --data, or digits (held-out ones)."""
    n: int = 8
    """Number of images."""
    background: str = "white"
    """Colour below the transparent pixels of images."""
    out: Path = Path("denoised.png")
    """Grid to write."""
    seed: int = 0
    """Seed of the noise."""
    start: int = 0
    """Index of the first image's noise."""
    sigma: float = 0.3
    """Standard deviation of the noise, in units of the image range [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--n", self.n)
        check_png("--out", self.out)
        check_positive("--sigma", self.sigma)
        parse_colour(self.background)


Command = (
    Annotated[Inpaint, tyro.conf.subcommand("inpaint")]
    | Annotated[Colourise, tyro.conf.subcommand("colourise")]
    | Annotated[SuperResolve, tyro.conf.subcommand("super-resolve")]
    | Annotated[Deblur, tyro.conf.subcommand("deblur")]
    | Annotated[SDEdit, tyro.conf.subcommand("sdedit")]
    | Annotated[Guide, tyro.conf.subcommand("guide")]
    | Annotated[Interpolate, tyro.conf.subcommand("interpolate")]
    | Annotated[Denoise, tyro.conf.subcommand("denoise")]
)


def parse(args: list[str] | None) -> Drawing | Denoise:
    """Parses the command line; UsageError if it is invalid."""
    found = command.parse(cast(Any, Command), args, "ncsn_fast.edit", "Edit images with a model.")
    return cast(Drawing | Denoise, found)
