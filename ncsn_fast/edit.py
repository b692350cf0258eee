"""Command `python -m ncsn_fast.edit`: edits images and writes before/after grids."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("edit"))

import abc
import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro
from torch import Tensor

from ncsn_fast.cli.arguments import MASKS, import_function, make_mask, read_images
from ncsn_fast.cli.options import (
    ModelOptions,
    SamplingOptions,
    check_count,
    check_png,
    own_options_first,
)
from ncsn_fast.cli.outputs import check_output, check_pictures
from ncsn_fast.data.decode import parse_colour
from ncsn_fast.data.images import grid_shape, save_grid
from ncsn_fast.data.rescue import write_or_keep
from ncsn_fast.inference.editing import Inpainting, Restoration, mean_of_colours
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops.noise import Stream, normal, sample_indices
from ncsn_fast.sampler import Sampler
from ncsn_fast.samplers.operators import Operator, block_mean, gaussian_blur
from ncsn_fast.samplers.program_transforms import start_level

MEASURING = 7  # stream of the noise that commands add to measurements
ROWS = 3  # of a grid, at most: original, measured, result
Grid = tuple[Tensor, int]  # images, and images per row


@dataclasses.dataclass(frozen=True)
class Drawing(SamplingOptions, abc.ABC):
    """Options of all commands that draw samples."""

    out: Path = Path("edited.png")
    """Grid to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_png("--out", self.out)

    @abc.abstractmethod
    def grid(self, sampler: Sampler) -> Grid:
        """Returns the grid of the command."""


@dataclasses.dataclass(frozen=True)
class OfImages(Drawing):
    """Options of all commands that start from images."""

    images: str = "digits"
    """Folder or zip of images, one image file, hf:NAME, or digits (held-out ones that no training
    saw)."""
    n: int = 8
    """Number of images."""
    background: str = "white"
    """Colour below the transparent pixels of images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--n", self.n)
        parse_colour(self.background)

    def read(self, model: ScoreModel, shape: tuple[int, ...] | None = None) -> Tensor:
        """Reads the images, (n, *shape), at the model's size without a shape.

        Raises ValueError if a grid of them would be too large.
        """
        images = read_images(self.images, self.n, shape or model.image_shape, self.background)
        grid_shape(ROWS * len(images), *model.image_shape[1:], len(images))
        return images


@own_options_first
@dataclasses.dataclass(frozen=True)
class Inpaint(OfImages):
    """Fill in unknown pixels. Rows of the grid: original, known pixels, result."""

    mask: str = "left"
    """Known pixels: left, right, top, bottom (half), centre (square), or an image file, white
    and opaque where known."""
    variant: Inpainting | None = None
    """How known pixels are imposed: as published in 2020 or 2019, or by projecting the score.
    Default: ncsnv2, or projected for methods that cannot impose pixels (ode, adaptive)."""

    def grid(self, sampler: Sampler) -> Grid:
        images = self.read(sampler.model)
        mask = make_mask(self.mask, *images.shape[2:])
        result = sampler.inpaint(images, mask, variant=self.variant, **self.sampling())
        return torch.cat((images, torch.where(mask, images, 0.5), result)), len(images)


@dataclasses.dataclass(frozen=True)
class Measured(OfImages):
    """Options of all commands that restore images from measurements of them."""

    given: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The images are measurements already and are not measured first; no row of originals."""
    noise: float = 0.0
    """Standard deviation of the noise on the measurements, in units of the image range [0, 1]; it
    is added, unless the images are --given."""
    how: Restoration | None = None
    """Impose the measurements at every step, or project the score on them. Default: imposed, but
    projected with noise and for methods that cannot impose them (ode, adaptive)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"--noise must be at least 0 and finite; got {self.noise}")

    @abc.abstractmethod
    def operator(self, sampler: Sampler) -> Operator:
        """Returns the measurement operator."""

    def grid(self, sampler: Sampler) -> Grid:
        operator, shape = self.operator(sampler), sampler.model.image_shape
        measured_shape = tuple(operator.apply(torch.zeros(1, *shape)).shape[1:])
        if self.given:
            before, y = [], self.read(sampler.model, measured_shape)
        else:
            images = self.read(sampler.model)
            before, y = [images], operator.apply(images)
        if self.noise and not self.given:
            samples = sample_indices(self.start, len(y))
            y = y + self.noise * normal(self.seed, samples, MEASURING, 0, measured_shape)
        result = sampler.restore(y, operator, noise=self.noise, how=self.how, **self.sampling())
        times = shape[1] // measured_shape[1]
        seen = y.repeat_interleave(times, 2).repeat_interleave(times, 3).expand(-1, *shape)
        return torch.cat((*before, seen, result)), len(y)


@own_options_first
@dataclasses.dataclass(frozen=True)
class Colourise(Measured):
    """Colour grey images. Rows of the grid: original, mean of its channels, result."""

    def operator(self, sampler: Sampler) -> Operator:
        return mean_of_colours(sampler.model)


@own_options_first
@dataclasses.dataclass(frozen=True)
class SuperResolve(Measured):
    """Enlarge images. Rows of the grid: original, means of blocks of pixels, result."""

    factor: int = 4
    """How many times larger height and width become."""

    def operator(self, sampler: Sampler) -> Operator:
        return block_mean(self.factor, *sampler.model.image_shape[1:])


@own_options_first
@dataclasses.dataclass(frozen=True)
class Deblur(Measured):
    """Sharpen images that a Gaussian has blurred. Rows of the grid: original, blurred, result."""

    blur: float = 2.0
    """Standard deviation of the Gaussian, in pixels of the model's images."""
    noise: float = 0.02
    """Standard deviation of the noise on the blurred images, in units of the image range [0, 1]; it
    is added, unless the images are --given. 8 bits alone are 0.001."""

    def operator(self, sampler: Sampler) -> Operator:
        return gaussian_blur(self.blur, *sampler.model.image_shape[1:])


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

    def grid(self, sampler: Sampler) -> Grid:
        images = self.read(sampler.model)
        strength = 0.5 if self.strength is None and self.sigma is None else self.strength
        sigma = start_level(sampler.model.sigmas.numpy(force=True), self.sigma, strength)
        noisy = images + sigma * noise_of(images, self.seed, self.start)
        result = sampler.sdedit(images, sigma=self.sigma, strength=strength, **self.sampling())
        return torch.cat((images, noisy, result)), len(images)


@own_options_first
@dataclasses.dataclass(frozen=True)
class Guide(Drawing):
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

    def grid(self, sampler: Sampler) -> Grid:
        grid_shape((1 + len(self.labels)) * self.n, *sampler.model.image_shape[1:], self.n)
        classifier = import_function("--classifier", self.classifier)
        rows = [sampler.sample(self.n, **self.sampling())]
        for label in self.labels:
            rows.append(
                sampler.guided([label] * self.n, classifier, scale=self.scale, **self.sampling())
            )
        return torch.cat(rows), self.n


@own_options_first
@dataclasses.dataclass(frozen=True)
class Interpolate(Drawing):
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

    def grid(self, sampler: Sampler) -> Grid:
        grid_shape(self.pairs * self.frames, *sampler.model.image_shape[1:], self.frames)
        return sampler.interpolate(self.pairs, self.frames, **self.sampling()), self.frames


@own_options_first
@dataclasses.dataclass(frozen=True)
class Denoise(ModelOptions):
    """Add noise, then remove it (Tweedie). Rows of the grid: original, noisy, denoised."""

    images: str = "digits"
    """Folder or zip of images, one image file, hf:NAME, or digits (held-out ones)."""
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
        parse_colour(self.background)

    def grid(self, sampler: Sampler) -> Grid:
        images = read_images(self.images, self.n, sampler.model.image_shape, self.background)
        grid_shape(ROWS * len(images), *sampler.model.image_shape[1:], len(images))
        noisy = images + self.sigma * noise_of(images, self.seed, self.start)
        return torch.cat((images, noisy, sampler.denoise(noisy, self.sigma))), len(images)


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


def noise_of(images: Tensor, seed: int, start: int) -> Tensor:
    """Returns the noise that sampling from images starts with, in their shape."""
    samples = sample_indices(start, len(images))
    return normal(seed, samples, Stream.INITIAL, 0, tuple(images.shape[1:]))


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    options = command.parse(cast(Any, Command), args, "ncsn_fast.edit", "Edit images with a model.")
    command.single_process("ncsn_fast.edit")
    check_output("--out", options.out)
    sampler = options.sampler()
    check_pictures(sampler.model)
    images, columns = options.grid(sampler)
    write_or_keep(options.out, lambda path: save_grid(images, path, columns))
    print(options.out)
    return 0


__all__ = ["MASKS", "main", "make_mask"]
