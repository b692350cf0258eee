"""`python -m ncsn_fast.edit`: inpainting, interpolation and denoising, with before/after grids."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import tyro
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ncsn_fast import cli, data
from ncsn_fast.images import save_grid
from ncsn_fast.noise import Stream, normal, sample_indices
from ncsn_fast.options import ModelOptions, SamplingOptions, check_count, check_png
from ncsn_fast.sampler import Sampler
from ncsn_fast.samplers.editing import InpaintVariant

MASKS = ("left", "right", "top", "bottom", "centre")


@dataclasses.dataclass(frozen=True)
class Inpaint(SamplingOptions):
    """Fill in unknown pixels. Rows of the grid: original, what is known, result."""

    images: str = "digits"
    """Folder or zip of images, one image file, hf:NAME, or digits (held-out ones that no training
    saw)."""
    n: int = 8
    """Number of images."""
    out: Path = Path("edited.png")
    """Grid to write."""
    mask: str = "left"
    """What is known: left, right, top, bottom (half), centre (square), or a PNG, white where
    known."""
    variant: InpaintVariant = "ncsnv2"
    """Published way of imposing known pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--n", self.n)
        check_png("--out", self.out)


@dataclasses.dataclass(frozen=True)
class Interpolate(SamplingOptions):
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
        check_png("--out", self.out)


@dataclasses.dataclass(frozen=True)
class Denoise(ModelOptions):
    """Add noise, then remove it (Tweedie). Rows of the grid: original, noisy, denoised."""

    images: str = "digits"
    """Folder or zip of images, one image file, hf:NAME, or digits (held-out ones)."""
    n: int = 8
    """Number of images."""
    out: Path = Path("denoised.png")
    """Grid to write."""
    seed: int = 0
    """Seed of the noise."""
    start: int = 0
    """Index of the first image's noise."""
    sigma: float = 0.3
    """Standard deviation of the noise, in units of the image range [0, 1]."""

    def __post_init__(self) -> None:
        check_count("--n", self.n)
        check_png("--out", self.out)


Command = (
    Annotated[Inpaint, tyro.conf.subcommand("inpaint")]
    | Annotated[Interpolate, tyro.conf.subcommand("interpolate")]
    | Annotated[Denoise, tyro.conf.subcommand("denoise")]
)


def read_images(source: str, n: int, sampler: Sampler) -> Tensor:
    """The first n images of a source, at the model's size, float32 in [0, 1]."""
    channels, height, width = sampler.model.image_shape
    if height != width:
        raise ValueError(
            f"the command line edits square images; this model works on {height}x{width}"
        )
    path = Path(source).expanduser()
    if source == "digits" and channels == 1:
        images = data.digits("held-out", height)[0][:n]
    elif path.is_file() and path.suffix.lower() in data.SUFFIXES:
        transform = data.Transform(height, channels)
        images = data.read_image(path, transform)[None]
    else:
        opened = data.open_images(source, size=height, channels=channels)
        images = data.stack(opened, list(range(min(n, len(opened)))))
    return images.to(torch.float32) / 255


def make_mask(name: str, height: int, width: int) -> Tensor:
    """Boolean mask (1, H, W), True where known, by name or from an image file."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    half_h, half_w, quarter_h, quarter_w = height // 2, width // 2, height // 4, width // 4
    windows = {
        "left": (slice(None), slice(0, half_w)),
        "right": (slice(None), slice(half_w, None)),
        "top": (slice(0, half_h), slice(None)),
        "bottom": (slice(half_h, None), slice(None)),
        "centre": (slice(quarter_h, height - quarter_h), slice(quarter_w, width - quarter_w)),
    }
    if name in windows:
        mask[:, windows[name][0], windows[name][1]] = True
        return mask
    try:
        image = Image.open(name).convert("L").resize((width, height), Image.Resampling.NEAREST)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(
            f"--mask must be {', '.join(MASKS)} or an image file; got {name!r} ({error})"
        ) from error
    return torch.from_numpy(np.asarray(image) >= 128)[None]


def inpaint(command: Inpaint, sampler: Sampler) -> None:
    images = read_images(command.images, command.n, sampler)
    mask = make_mask(command.mask, *images.shape[2:])
    result = sampler.inpaint(
        images,
        mask,
        variant=command.variant,
        seed=command.seed,
        start=command.start,
        progress=not command.quiet,
        **command.method_options(),
    )
    save_grid(torch.cat((images, torch.where(mask, images, 0.5), result)), command.out, len(images))


def interpolate(command: Interpolate, sampler: Sampler) -> None:
    frames = sampler.interpolate(
        command.pairs,
        command.frames,
        seed=command.seed,
        start=command.start,
        progress=not command.quiet,
        **command.method_options(),
    )
    save_grid(frames, command.out, command.frames)


def denoise(command: Denoise, sampler: Sampler) -> None:
    images = read_images(command.images, command.n, sampler)
    samples = sample_indices(command.start, len(images))
    noise = normal(command.seed, samples, Stream.INITIAL, 0, tuple(images.shape[1:]))
    noisy = images + command.sigma * noise
    save_grid(
        torch.cat((images, noisy, sampler.denoise(noisy, command.sigma))), command.out, len(images)
    )


def main(args: list[str] | None = None) -> int:
    """Command line; exit code 0."""
    command = cli.parse(cast(Any, Command), args, "ncsn_fast.edit", "Edit images with a model.")
    sampler = command.sampler()
    if isinstance(command, Inpaint):
        inpaint(command, sampler)
    elif isinstance(command, Interpolate):
        interpolate(command, sampler)
    else:
        denoise(command, sampler)
    print(command.out)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
