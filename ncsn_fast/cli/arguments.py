"""Command-line arguments that name something: images, masks, functions of the user."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from ncsn_fast.data import datasets
from ncsn_fast.data.decode import WarnOnce, check_image, decode, pixels
from ncsn_fast.data.formats import recognise, split_of
from ncsn_fast.data.transform import Transform, centre_square
from ncsn_fast.evaluation.features import Extractor, function_extractor, load_extractor
from ncsn_fast.names import suggestion

MASKS = ("left", "right", "top", "bottom", "centre")


def check_source(source: str | None) -> None:
    """Raises DataError unless data of this name, if any, can be there, before a model is read."""
    if source is not None and not datasets.is_named(source):
        datasets.format_of(split_of(source)[0])


def check_images(source: str) -> None:
    """Raises DataError unless `read_images` can take this source, before a model is read."""
    if _is_picture(path := Path(source).expanduser()):
        check_image(path)
    else:
        check_source(source)


def _is_picture(path: Path) -> bool:
    """Whether a path is one image file, and no data set."""
    return path.is_file() and path.suffix.lower() != ".zip" and recognise(path) is None


def read_images(source: str, n: int, shape: tuple[int, ...], background: str = "white") -> Tensor:
    """Reads the first n images of a source, (n, C, H, W) for a shape (C, H, W), float32 in [0, 1].

    Args:
        source: a folder or zip, one image file, hf:NAME, or digits (the held-out ones).
        background: colour below transparent pixels.
    """
    channels, height, width = shape
    if height != width:
        raise ValueError(
            f"the command line edits square images; this model works on {height}x{width}"
        )
    path = Path(source).expanduser()
    if source == "digits" and channels == 1:
        images = datasets.digits("held-out", height)[0][:n]
    elif _is_picture(path):
        transform = Transform(height, channels, background=background)
        images = datasets.read_image(path, transform)[None]
    else:
        opened = datasets.open_images(source, size=height, channels=channels, background=background)
        images = datasets.stack(opened, list(range(min(n, len(opened)))))
    return images.to(torch.float32) / 255


def make_mask(name: str, height: int, width: int) -> Tensor:
    """Makes a boolean mask (1, H, W), True where known, from a name or an image file."""
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
    return _read_mask(_mask_file(name), height, width)


def check_mask(name: str) -> None:
    """Raises ValueError unless --mask is a name or an image file, before a model is read."""
    if name not in MASKS:
        check_image(_mask_file(name))


def _mask_file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(
            f"--mask must be {', '.join(MASKS)} or an image file; got {name!r} (there is no such "
            f"file){suggestion(name, MASKS)}"
        )
    return path


def _read_mask(path: Path, height: int, width: int) -> Tensor:
    """Reads a boolean mask (1, H, W) from an image file, True where it is white and opaque.

    A file of another size is cropped and resized as images are; grey levels are thresholded at 128.
    Both are logged as warnings.

    Raises:
        DataError: the file cannot be decoded.
        ValueError: no pixel or every pixel is known, or the size differs and is not square.
    """
    warn = WarnOnce()
    image = decode(path, 1, name=str(path), background="black", warn=warn)
    if image.size != (width, height):
        if height != width:
            raise ValueError(
                f"--mask {path} must have the size of the images, {width}x{height}; got "
                f"{image.width}x{image.height}: resize it"
            )
        warn(
            "size",
            f"--mask {path} is {image.width}x{image.height}; it is cropped and resized to "
            f"{width}x{height}, as images are",
        )
        image = centre_square(image, height, resample=Image.Resampling.NEAREST)
    levels = pixels(image)
    mask = levels >= 128
    if between := int(((levels > 0) & (levels < 255)).sum()):
        warn(
            "levels",
            f"--mask {path} has {between} of {levels.numel()} pixels between black and white; "
            "those of at least 128 are known",
        )
    if bool(mask.all()) or not bool(mask.any()):
        raise ValueError(
            f"--mask {path} makes {'every' if bool(mask.all()) else 'no'} pixel known; known "
            "pixels are white and opaque"
        )
    return mask


def import_function(option: str, name: str) -> Callable[..., Any]:
    """Imports the function MODULE:NAME.

    Modules of the working folder are found too, as with `python -m`; installed commands would not
    see them.

    Raises:
        ValueError: there is no such function; the message names the option.
    """
    module, _, attribute = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {name}: {error}") from error
    if not callable(found):
        raise ValueError(f"{option} {name} is no function; it is {found!r}")
    return cast(Callable[..., Any], found)


def open_extractor(name: str) -> Extractor:
    """Loads what --extractor names: digits, mnist, a file of weights, or MODULE:NAME."""
    module, _, function = name.partition(":")
    if module and function and not Path(name).exists():
        return function_extractor(name, import_function("--extractor", name))
    return load_extractor(name)
