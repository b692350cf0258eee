"""Command `python -m ncsn_fast.edit`: edits images and writes before/after grids."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("edit"))

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.cli.animation import Animation
from ncsn_fast.cli.arguments import (
    MASKS,
    check_images,
    check_mask,
    import_function,
    make_mask,
    read_images,
)
from ncsn_fast.cli.edit_options import (
    Animated,
    Colourise,
    Deblur,
    Denoise,
    Drawing,
    Guide,
    Inpaint,
    Interpolate,
    Measured,
    OfImages,
    SDEdit,
    SuperResolve,
    parse,
)
from ncsn_fast.cli.options import SamplingOptions
from ncsn_fast.cli.outputs import check_output, check_pictures
from ncsn_fast.data.images import grid_shape, save_grid
from ncsn_fast.data.rescue import write_or_keep
from ncsn_fast.inference.editing import mean_of_colours
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops.noise import Stream, normal, sample_indices, sample_range
from ncsn_fast.sampler import Sampler
from ncsn_fast.samplers.guidance import check_labels
from ncsn_fast.samplers.operators import Operator, block_mean, gaussian_blur
from ncsn_fast.samplers.program_transforms import start_level

MEASURING = 7  # stream of the noise that commands add to measurements
ROWS = 3  # of a grid, at most: original, measured, result


@dataclasses.dataclass(frozen=True)
class Grid:
    """Pictures that a command makes.

    Attributes:
        images: (N, C, H, W) of the whole grid.   columns: images per row.
        results: those that the chains ended with, in the order of the calls; None for a command
            without chains.
    """

    images: Tensor
    columns: int
    results: Tensor | None = None


Record = Callable[[dict[str, Any]], dict[str, Any]]  # arguments of a call -> those that record it


def read(
    options: OfImages | Denoise, model: ScoreModel, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Reads the images, (n, *shape), at the model's size without a shape.

    Raises ValueError if a grid of them would be too large.
    """
    images = read_images(options.images, options.n, shape or model.image_shape, options.background)
    grid_shape(ROWS * len(images), *model.image_shape[1:], len(images))
    return images


def noise_of(images: Tensor, seed: int, start: int) -> Tensor:
    """Returns the noise that sampling from images starts with, in their shape."""
    samples = sample_indices(start, len(images))
    return normal(seed, samples, Stream.INITIAL, 0, tuple(images.shape[1:]))


def drawing(options: OfImages | Interpolate, n: int, times: int = 1) -> dict[str, Any]:
    """Returns the arguments of a call that draws `times` images for each of n sample indices."""
    samples = (i for i in sample_range(options.start, n) for _ in range(times))
    return {**options.sampling(), **options.classes(samples)}


def inpaint(options: Inpaint, sampler: Sampler, record: Record) -> Grid:
    """Fills in unknown pixels."""
    images = read(options, sampler.model)
    mask = make_mask(options.mask, *images.shape[2:])
    call = {"variant": options.variant, **drawing(options, len(images))}
    result = sampler.inpaint(images, mask, **record(call))
    shown = torch.cat((images, torch.where(mask, images, 0.5), result))
    return Grid(shown, len(images), result)


def operator_of(options: Measured, model: ScoreModel) -> Operator:
    """Returns the measurement operator of a command."""
    if isinstance(options, SuperResolve):
        return block_mean(options.factor, *model.image_shape[1:])
    if isinstance(options, Deblur):
        return gaussian_blur(options.blur, *model.image_shape[1:])
    return mean_of_colours(model)


def restore(options: Measured, sampler: Sampler, record: Record) -> Grid:
    """Restores images from measurements of them."""
    operator, shape = operator_of(options, sampler.model), sampler.model.image_shape
    measured_shape = tuple(operator.apply(torch.zeros(1, *shape)).shape[1:])
    if options.given:
        before, y = [], read(options, sampler.model, measured_shape)
    else:
        images = read(options, sampler.model)
        before, y = [images], operator.apply(images)
    if options.noise and not options.given:
        samples = sample_indices(options.start, len(y))
        y = y + options.noise * normal(options.seed, samples, MEASURING, 0, measured_shape)
    noise, how = options.noise, options.how
    call = {"noise": noise, "how": how, **drawing(options, len(y))}
    result = sampler.restore(y, operator, **record(call))
    times = shape[1] // measured_shape[1]
    seen = y.repeat_interleave(times, 2).repeat_interleave(times, 3).expand(-1, *shape)
    return Grid(torch.cat((*before, seen, result)), len(y), result)


def sdedit(options: SDEdit, sampler: Sampler, record: Record) -> Grid:
    """Adds noise to images and samples from there."""
    images = read(options, sampler.model)
    strength = 0.5 if options.strength is None and options.sigma is None else options.strength
    sigma = start_level(sampler.model.sigmas.numpy(force=True), options.sigma, strength)
    noisy = images + sigma * noise_of(images, options.seed, options.start)
    call = {"sigma": options.sigma, "strength": strength, **drawing(options, len(images))}
    result = sampler.sdedit(images, **record(call))
    return Grid(torch.cat((images, noisy, result)), len(images), result)


def guide(options: Guide, sampler: Sampler, record: Record) -> Grid:
    """Draws samples of any class, then of each label."""
    n = options.n
    grid_shape((1 + len(options.labels)) * n, *sampler.model.image_shape[1:], n)
    classifier = import_function("--classifier", options.classifier)
    shape, labels = sampler.model.image_shape, torch.tensor(options.labels)
    check_labels(labels, classifier, shape, sampler.device)  # before the first row is drawn
    call = {"scale": options.scale, **options.sampling()}
    rows = [sampler.sample(n, **record(options.sampling()))]
    rows += [sampler.guided([label] * n, classifier, **record(call)) for label in options.labels]
    return Grid(torch.cat(rows), n, torch.cat(rows))


def interpolate(options: Interpolate, sampler: Sampler, record: Record) -> Grid:
    """Draws rows of frames between two samples."""
    pairs, frames = options.pairs, options.frames
    grid_shape(pairs * frames, *sampler.model.image_shape[1:], frames)
    call = drawing(options, pairs, frames)
    return Grid(sampler.interpolate(pairs, frames, **call), frames)


def denoise(options: Denoise, sampler: Sampler, record: Record) -> Grid:
    """Adds noise to images and removes it."""
    images = read(options, sampler.model)
    noisy = images + options.sigma * noise_of(images, options.seed, options.start)
    return Grid(torch.cat((images, noisy, sampler.denoise(noisy, options.sigma))), len(images))


GRIDS: dict[type[Drawing | Denoise], Callable[[Any, Sampler, Record], Grid]] = {
    Inpaint: inpaint,
    Colourise: restore,
    SuperResolve: restore,
    Deblur: restore,
    SDEdit: sdedit,
    Guide: guide,
    Interpolate: interpolate,
    Denoise: denoise,
}


def check_inputs(options: Drawing | Denoise) -> None:
    """Raises ValueError for files and functions that cannot be used, before a model is read."""
    if isinstance(options, OfImages | Denoise):
        check_images(options.images)
    if isinstance(options, Inpaint):
        check_mask(options.mask)
    if isinstance(options, Guide):
        import_function("--classifier", options.classifier)


def run(options: Drawing | Denoise) -> int:
    """Does what the options say; exit code 0."""
    command.single_process("ncsn_fast.edit")
    animate = options.animate if isinstance(options, Animated) else None
    check_output("--out", options.out)
    check_output("--animate", animate)
    check_inputs(options)
    sampler = options.sampler()
    check_pictures(sampler.model)
    if isinstance(options, SamplingOptions):
        options.check_model(sampler.model)
    animation = Animation(float(sampler.model.sigmas[-1]))
    grid = GRIDS[type(options)](options, sampler, dict if animate is None else animation.of)
    write_or_keep(options.out, lambda path: save_grid(grid.images, path, grid.columns))
    print(options.out)
    if animate is not None and grid.results is not None:
        animation.write(animate, grid.results, grid.columns)
        print(animate)
    return 0


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    return run(parse(args))


__all__ = ["MASKS", "main", "make_mask"]
