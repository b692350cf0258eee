"""Image conversion: quantisation, grids, PNG files, validation of a user's images and masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ncsn_fast.data.decode import WarnOnce, check_channels, decode, pixels, scale_remedy
from ncsn_fast.data.files import atomic_write

UInt8 = NDArray[np.uint8]
Output = Literal["pt", "np", "pil"]


def to_uint8(images: Tensor) -> UInt8:
    """Quantises (N, C, H, W) in [0, 1] to (N, H, W, C) uint8 by round(255 x).

    The only place where images are quantised.
    """
    clipped = images.detach().to("cpu", torch.float32).clamp(0, 1)
    return (clipped * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Converts (N, C, H, W) in [0, 1] to a list of PIL images (L or RGB)."""
    return [_pil(image) for image in to_uint8(images)]


def _pil(array: UInt8) -> Image.Image:
    _check_channels(array.shape[-1])
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(
            f"pictures are grey or RGB; got {channels} channels: select 1 or 3 of them"
        )


def as_tensor(images: Any, shape: tuple[int, int, int]) -> Tensor:
    """Converts a user's images to float32 (N, C, H, W).

    Raises ValueError unless each has `shape` (C, H, W).

    Accepts a float tensor (N, C, H, W), whose range is not checked here (check_range), a uint8
    tensor of that shape, a uint8 array (N, H, W, C), or PIL images (one or several), which are
    converted by the rules of decode.decode.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Sequence) and images and all(isinstance(i, Image.Image) for i in images):
        check_channels(shape[0])
        warn = WarnOnce()
        decoded = [
            decode(image, shape[0], name=f"PIL image {i}", warn=warn, remedy="")
            for i, image in enumerate(images)
        ]
        sizes = {image.size for image in decoded}
        if len(sizes) > 1:
            raise ValueError(f"images of different sizes: {sorted(sizes)}; resize them to one")
        images = torch.stack([pixels(image) for image in decoded])
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"arrays of images must be uint8 (N, H, W, C); got {images.dtype} {images.shape}"
            )
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images must be a tensor, a uint8 array or PIL images; got {type(images).__name__}"
        )
    if images.ndim != 4 or tuple(images.shape[1:]) != shape:
        raise ValueError(
            f"this model works on images (N, {shape[0]}, {shape[1]}, {shape[2]}); "
            f"got {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return images.to("cpu", torch.float32) / 255
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1] or uint8; got {images.dtype}")
    images = images.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images hold NaN or infinite values")
    return images


def check_range(images: Tensor, noise: float = 0.0) -> None:
    """Raises ValueError unless images are in [0, 1], up to rounding and added noise.

    Args:
        images: float tensor of any shape; may be empty.
        noise: standard deviation of the noise that was added to them.
    """
    slack = 1e-3 + 6 * noise
    low, high = (float(end) for end in images.aminmax()) if images.numel() else (0.0, 0.0)
    if not (low >= -slack and high <= 1 + slack):
        raise ValueError(
            f"images must be in [0, 1]; got {low:.4g} to {high:.4g}: {scale_remedy(low, high)}"
        )


def as_mask(mask: Any, known: Tensor) -> Tensor:
    """Converts a user's mask to booleans of the shape of the images `known`, True where known.

    Raises ValueError unless the mask is boolean (or 0 and 1) and broadcasts to the images, and the
    known pixels are in [0, 1].
    """
    if isinstance(mask, Image.Image):
        raise ValueError("mask must be an array or tensor; convert it: np.asarray(mask) >= 128")
    try:
        given = torch.as_tensor(mask).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"mask must be an array or tensor of booleans; got {mask!r:.60}"
        ) from error
    keep = given.to(torch.bool)
    if not bool((keep.to(given.dtype) == given).all()):
        raise ValueError("mask must be boolean, or 0 and 1 (1 where known); threshold it first")
    try:
        keep = keep.expand(known.shape).contiguous()
    except RuntimeError as error:
        raise ValueError(
            f"mask must broadcast to the images {tuple(known.shape)}; got {tuple(given.shape)}"
        ) from error
    check_range(known[keep])
    return keep


GRID_PIXELS = 2**29  # 1.6 GB in memory


def grid_shape(
    n: int,
    height: int,
    width: int,
    columns: int | None = None,
    *,
    scale: int | None = None,
    gap: int = 2,
) -> tuple[int, int, int, int]:
    """Lays a grid out; arguments as for make_grid.

    Returns:
        height and width of the sheet in pixels, images per row, and enlargement.

    Raises:
        ValueError: no images, or a sheet of more than GRID_PIXELS.
    """
    if n == 0:
        raise ValueError("a grid needs at least one image")
    scale = scale or max(1, math.ceil(48 / max(height, width)))
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    sheet = (rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap)
    if math.prod(sheet) > GRID_PIXELS:
        raise ValueError(
            f"a grid of {n} images in {columns} columns would have {sheet[1]} x {sheet[0]} pixels, "
            f"more than {GRID_PIXELS}: take fewer images or columns, or one file each"
        )
    return *sheet, columns, scale


def make_grid(
    images: Tensor, columns: int | None = None, *, scale: int | None = None, gap: int = 2
) -> UInt8:
    """Returns a contact sheet (H, W, 3) uint8 of images (N, C, H, W) in [0, 1], row by row.

    Args:
        columns: images per row; None for a square.
        scale: integer upscaling (nearest); None enlarges small images to at least 48 pixels.
    """
    n, channels, height, width = images.shape
    sheet_height, sheet_width, columns, scale = grid_shape(
        n, height, width, columns, scale=scale, gap=gap
    )
    _check_channels(channels)
    tiles = to_uint8(images)
    sheet = np.full((sheet_height, sheet_width, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top = gap + (i // columns) * (height * scale + gap)
        left = gap + (i % columns) * (width * scale + gap)
        enlarged = tile.repeat(scale, axis=0).repeat(scale, axis=1)
        sheet[top : top + height * scale, left : left + width * scale] = enlarged
    return sheet


def save_grid(images: Tensor, path: str | Path, columns: int | None = None) -> UInt8:
    """Writes make_grid(images) as a PNG and returns it."""
    grid = make_grid(images, columns)
    save_png(grid, Path(path))
    return grid


def save_png(array: UInt8, path: Path) -> None:
    """Writes (H, W, C) uint8 as PNG, atomically."""
    with atomic_write(path) as temporary:
        _pil(array).save(temporary, format="PNG")


def sample_path(folder: Path, index: int) -> Path:
    """Returns the path of sample `index`, with a thousand files per folder, like EDM."""
    return folder / f"{index - index % 1000:06d}" / f"{index:06d}.png"


def check_output(output: str) -> None:
    """Raises ValueError unless `convert` supports this kind of output."""
    if output not in ("pt", "np", "pil"):
        raise ValueError(f"output must be 'pt', 'np' or 'pil'; got {output!r}")


def convert(images: Tensor, output: Output) -> Any:
    """Converts images (N, C, H, W) in [0, 1] to the requested output.

    "pt" returns them unchanged, "np" uint8 NHWC, "pil" a list of PIL images.
    """
    check_output(output)
    if output == "np":
        return to_uint8(images)
    return to_pil(images) if output == "pil" else images
