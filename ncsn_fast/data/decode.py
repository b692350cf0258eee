"""Decoding of images: from data sets, PIL images, masks and sample folders."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, ImageColor, UnidentifiedImageError

from ncsn_fast.data.limits import IMAGE_BYTES, PIXELS

if TYPE_CHECKING:  # the command line parses colours before torch is imported
    from torch import Tensor

log = logging.getLogger(__name__)

Colour = tuple[int, int, int]

# Formats are recognised by content; suffixes select the files of a folder or zip. Pillow reads more
# formats, but EPS would run a program.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "AVIF": (".avif", ".avifs"),
    "QOI": (".qoi",),
}
SUFFIXES = frozenset(suffix for row in FORMATS.values() for suffix in row)
REMEDY = "Remove or replace it."
_TRANSPOSE = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DARK = 2**14  # below it, 16-bit pixels may well be 14-bit data or less


class DataError(ValueError):
    """Error for images that cannot be read; the message names the image and the remedy."""


class WarnOnce:
    """Logs one warning for each kind of information loss in a data set or call.

    Of several worker processes only the first logs.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def is_new(self, kind: str) -> bool:
        """Whether a warning of this kind would be logged."""
        import torch.utils.data

        worker = torch.utils.data.get_worker_info()
        return kind not in self._seen and (worker is None or worker.id == 0)

    def __call__(self, kind: str, text: str) -> None:
        if self.is_new(kind):
            self._seen.add(kind)
            log.warning("%s (warned once)", text)


def decode(
    source: Path | bytes | Image.Image,
    channels: int,
    *,
    name: str,
    warn: WarnOnce,
    background: str = "white",
    remedy: str = REMEDY,
) -> Image.Image:
    """Decodes an image to 8-bit grey (mode L, 1 channel) or RGB (3 channels).

    - EXIF orientation is applied.
    - Alpha and transparent colours are composited on `background`. White is the default, as in
      image viewers: drawings and logos are mostly dark and would vanish on black.
    - 16-bit pixels: the high byte, as Pillow does for 16-bit colour files. Mode I (32 bits) is
      Pillow's other mode for 16-bit grey, so its pixels must be in [0, 65535]. 10, 12 and 14-bit
      data in 16 bits cannot be told from dark images: there is a warning.
    - Floating-point pixels must be in [0, 1]; they become round(255 x).
    - Palette, CMYK, YCbCr, HSV and LAB are converted to RGB by Pillow; 1 bit becomes 0 and 255.
      Grey is ITU-R 601 luma. ICC profiles are not applied.
    - Of several frames or pages the first is taken (of a PIL image, its current frame).

    Args:
        source: a file, its bytes, or a PIL image, which is not changed.
        channels: 1 or 3.
        name: name of the image in messages.
        warn: called when information is lost.
        background: colour, in any form that PIL.ImageColor accepts.
        remedy: last sentence of the message if the image cannot be decoded.

    Raises:
        DataError: the image cannot be decoded or exceeds a limit (limits.py).
    """
    colour, name = parse_colour(background), printable(name)
    with _decoded(source, name, remedy) as image:
        _warn_of_frames(image, name, warn)
        return _to_eight_bits(_apply_orientation(image, name, warn), channels, colour, name, warn)


def check_image(path: Path) -> None:
    """Raises DataError unless a file is an image that can be decoded."""
    with _decoded(path, printable(str(path)), REMEDY):
        pass


def pixels(image: Image.Image) -> Tensor:
    """Converts a grey (L) or RGB image to uint8 (C, H, W)."""
    import torch

    array = np.array(image, dtype=np.uint8).reshape(image.height, image.width, -1)
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def printable(text: str) -> str:
    """Replaces unprintable characters, such as line breaks in a file name."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def parse_colour(text: str) -> Colour:
    """Parses a colour such as white, #ff8000 or rgb(255, 128, 0) as RGB.

    Raises:
        ValueError: not a colour.
    """
    try:
        return ImageColor.getcolor(text, "RGB")[:3]  # type: ignore[index, return-value]
    except ValueError as error:
        raise ValueError(
            f"background must be a colour such as white, black or #ff8000; got {text!r}"
        ) from error


def check_channels(channels: int) -> None:
    """Raises DataError unless images can be decoded to this number of channels."""
    if channels not in (1, 3):
        raise DataError(
            f"images are decoded to grey or RGB, but the model has {channels} channels: pass its "
            "images as tensors (N, C, H, W), from Python"
        )


def scale_remedy(low: float, high: float) -> str:
    """Returns how to scale values in [low, high] to [0, 1]."""
    if -1.01 <= low < 0 and high <= 1.01:
        return "map images in [-1, 1] with (x + 1) / 2"
    if low >= 0 and 1.01 < high <= 255:
        return "divide by 255"
    if low >= 0 and 255 < high <= 65535:
        return "divide by 65535"
    return "scale them"


@functools.cache
def _formats() -> list[str]:
    """Returns the formats that the installed Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextlib.contextmanager
def _open(source: Path | bytes | Image.Image, name: str) -> Iterator[Image.Image]:
    """Opens an image without decoding its pixels."""
    if isinstance(source, Image.Image):
        yield source
        return
    if isinstance(source, Path) and not source.is_file():  # opening a FIFO would block
        raise DataError(f"{name} {'is not a file' if source.exists() else 'does not exist'}")
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    IMAGE_BYTES.check(size, name, DataError)
    limit = PIXELS.value()
    if Image.MAX_IMAGE_PIXELS is not None and limit > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # Pillow's own limit would reject what the user allowed
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        yield Image.open(file, formats=_formats())


@contextlib.contextmanager
def _decoded(source: Path | bytes | Image.Image, name: str, remedy: str) -> Iterator[Image.Image]:
    """Opens an image and decodes its pixels; DataError for whatever is wrong with it."""
    try:
        with _open(source, name) as image:
            _check_size(image, name)
            image.load()
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders raise nearly any exception for damaged files
        raise DataError(f"cannot decode {name}: {_reason(error)}. {remedy}".rstrip()) from error


def _check_size(image: Image.Image, name: str) -> None:
    if 0 in image.size:
        raise DataError(f"{name} has no pixels: its size is {image.width}x{image.height}")
    PIXELS.check(image.width * image.height, f"{name} ({image.width}x{image.height})", DataError)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a {', '.join(_formats())} file, or its header is damaged"
    if isinstance(error, MemoryError):
        return "out of memory"
    return printable(str(error) or type(error).__name__).rstrip(".")


def _warn_of_frames(image: Image.Image, name: str, warn: WarnOnce) -> None:
    # The other images of an MPO are previews, depth maps or a second view of the first.
    if warn.is_new("frames") and image.format != "MPO" and getattr(image, "is_animated", False):
        frames = getattr(image, "n_frames", 2)
        warn("frames", f"{name} has {frames} frames or pages; only the first is used")


def _apply_orientation(image: Image.Image, name: str, warn: WarnOnce) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # as for decoders: nearly any exception
        warn("exif", f"{name} has damaged EXIF data ({_reason(error)}); its orientation is ignored")
        return image
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _to_eight_bits(
    image: Image.Image, channels: int, background: Colour, name: str, warn: WarnOnce
) -> Image.Image:
    """Converts any mode to L or RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _scale_grey(image, name, warn)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            colour = "#" + "".join(f"{value:02x}" for value in background)
            warn("alpha", f"{name} has transparent pixels; it is composited on {colour}")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    if image.mode not in ("1", "L", "LA", "RGB"):
        image = image.convert("RGB")  # Pillow cannot convert LAB or HSV to L directly
    if channels == 1 and warn.is_new("grey") and _has_colours(image):
        warn("grey", f"{name} has colours, and is made grey; a model of 3 channels keeps them")
    return image.convert("L" if channels == 1 else "RGB")


def _has_colours(image: Image.Image) -> bool:
    if image.mode != "RGB":
        return False
    red, *others = image.split()
    return any(ImageChops.difference(red, other).getbbox() is not None for other in others)


def _scale_grey(image: Image.Image, name: str, warn: WarnOnce) -> Image.Image:
    """Scales deeper grey to 8 bits (L); a transparent level becomes alpha (LA)."""
    values, transparent = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray(_scale(values, name, warn))
    if isinstance(transparent, int):
        alpha = np.where(values == transparent, np.uint8(0), np.uint8(255))
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _scale(values: NDArray[Any], name: str, warn: WarnOnce) -> NDArray[np.uint8]:
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also for NaN
            raise DataError(
                f"{name} has floating-point pixels, which must be in [0, 1]; got {low:.4g} to "
                f"{high:.4g}: {scale_remedy(low, high)}"
            )
        warn("depth", f"{name} has floating-point pixels; they are rounded to 8 bits")
        return np.rint(values * np.float32(255)).astype(np.uint8)
    if low < 0 or high > 65535:
        raise DataError(
            f"{name} has integer pixels, which must be in [0, 65535]; got {low} to {high}: save it "
            "with 8 or 16 bits"
        )
    if 0 < high < _DARK:
        bits = max(8, int(high).bit_length())
        warn(
            "dark",
            f"{name} has 16-bit pixels of at most {high}, which is nearly black; if it holds "
            f"{bits}-bit data, multiply its pixels by {2 ** (16 - bits)} first",
        )
    warn("depth", f"{name} has 16-bit pixels; only their high byte is used")
    return (values >> 8).astype(np.uint8)
