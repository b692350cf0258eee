"""The decoder of every picture: of data sets, callers' PIL images, masks and sample folders."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError
from torch import Tensor

from ncsn_fast.data.limits import IMAGE_BYTES, PIXELS

log = logging.getLogger(__name__)

Colour = tuple[int, int, int]

# What is decoded, by content, and the suffixes by which files of a folder or zip are taken for
# pictures. Pillow reads more; EPS is left out because reading it runs a program.
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
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DARK = 2**14  # 16-bit pictures below it look as if they held 14 bits or fewer


class DataError(ValueError):
    """Images that cannot be read; the message says which and what to do."""


class Notices:
    """What decoding lost: a warning for each kind of loss, once for a data set or a call.

    Of the worker processes that share a data set, the first speaks.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()

    def due(self, kind: str) -> bool:
        """Whether a loss of this kind has not been said yet."""
        worker = torch.utils.data.get_worker_info()
        return kind not in self._said and (worker is None or worker.id == 0)

    def say(self, kind: str, text: str) -> None:
        if self.due(kind):
            self._said.add(kind)
            log.warning("%s (said once)", text)


def decode(
    source: Path | bytes | Image.Image,
    channels: int,
    *,
    name: str,
    notices: Notices,
    background: str = "white",
    remedy: str = REMEDY,
) -> Image.Image:
    """One picture with 8 bits, grey (mode L) for 1 channel or RGB for 3, by these rules:

    - Orientation: turned as EXIF says.
    - Alpha, and colours that are marked as transparent: laid on `background`. White is the default
      because it is what viewers show: drawings and logos are mostly dark on transparent paper, and
      would vanish on black.
    - 16 bits: the high byte, which is what Pillow does to the colours of 16-bit files. Mode I (32
      bits) is how Pillow holds 16-bit grey, so it is read as that, and refused beyond 0 to 65535.
      Nothing tells 10, 12 or 14 bits in such a container from a dark picture: a warning does.
    - Floats: refused unless in [0, 1]; round(255 x).
    - Colours: palette, CMYK, YCbCr, HSV and LAB become RGB as Pillow converts them, 1 bit becomes 0
      and 255. Grey is ITU-R 601 luma. ICC profiles are not applied.
    - Frames and pages: the first (of a PIL image the current one).

    Args:
        source: a file, its bytes, or a PIL image, which is left as it is.
        channels: 1 or 3.
        name: the picture's, for messages.
        notices: says once what was lost.
        background: a colour, as PIL.ImageColor reads it.
        remedy: what a message tells the reader to do about a picture that cannot be decoded.

    Raises:
        DataError: with the name, whatever the decoders raise, and beyond the limits (limits.py).
    """
    ground, name = parse_colour(background), printable(name)
    try:
        with _opened(source, name) as image:
            _check_size(image, name)
            image.load()
            if notices.due("frames"):
                _say_frames(image, name, notices)
            return _flat(_turned(image, name, notices), channels, ground, name, notices)
    except DataError:
        raise
    except Exception as error:  # damaged files make the decoders raise nearly anything
        reason = _reason(error)
        raise DataError(f"cannot decode {name}: {reason}. {remedy}".rstrip()) from error


def pixels(image: Image.Image) -> Tensor:
    """uint8 (C, H, W) of a grey (L) or RGB image."""
    array = np.array(image, dtype=np.uint8).reshape(image.height, image.width, -1)
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def printable(text: str) -> str:
    """A text from outside, such as a file's name, on one line that any terminal shows."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def parse_colour(text: str) -> Colour:
    """RGB of a colour such as white, #ff8000 or rgb(255, 128, 0); ValueError if it is none."""
    try:
        return ImageColor.getcolor(text, "RGB")[:3]  # type: ignore[index, return-value]
    except ValueError as error:
        raise ValueError(
            f"background must be a colour such as white, black or #ff8000; got {text!r}"
        ) from error


def check_channels(channels: int) -> None:
    """DataError unless pictures can have so many channels."""
    if channels not in (1, 3):
        raise DataError(
            f"pictures are read as grey or RGB, and this network has {channels} channels: give its "
            "images as tensors (N, C, H, W), from Python"
        )


def scale_remedy(low: float, high: float) -> str:
    """How numbers from low to high come to lie in [0, 1]."""
    if -1.01 <= low < 0 and high <= 1.01:
        return "map images in [-1, 1] with (x + 1) / 2"
    if low >= 0 and 1.01 < high <= 255:
        return "divide by 255"
    if low >= 0 and 255 < high <= 65535:
        return "divide by 65535"
    return "scale them"


@functools.cache
def _formats() -> list[str]:
    """Of FORMATS, those that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextlib.contextmanager
def _opened(source: Path | bytes | Image.Image, name: str) -> Iterator[Image.Image]:
    """The picture, its pixels not yet decoded."""
    if isinstance(source, Image.Image):
        yield source
        return
    if isinstance(source, Path) and not source.is_file():  # a FIFO would be waited for
        raise DataError(f"{name} {'is no file' if source.exists() else 'does not exist'}")
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    IMAGE_BYTES.check(size, name, DataError)
    most = PIXELS.value()
    if Image.MAX_IMAGE_PIXELS is not None and most > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = most  # or Pillow's own bound refuses what the environment allows
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        yield Image.open(file, formats=_formats())


def _check_size(image: Image.Image, name: str) -> None:
    if 0 in image.size:
        raise DataError(f"{name} has no pixels: it is {image.width}x{image.height}")
    PIXELS.check(image.width * image.height, f"{name} ({image.width}x{image.height})", DataError)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is no {', '.join(_formats())} file, or its beginning is damaged"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    return printable(str(error) or type(error).__name__).rstrip(".")


def _say_frames(image: Image.Image, name: str, notices: Notices) -> None:
    # The further pictures of an MPO are previews, depths or the other eye's view of the first.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        frames = getattr(image, "n_frames", 2)
        notices.say("frames", f"{name} has {frames} frames or pages; the first of a file is taken")


def _turned(image: Image.Image, name: str, notices: Notices) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # as wild as the decoders' own
        text = f"{name} has damaged EXIF data ({_reason(error)}); it is taken as not turned"
        notices.say("exif", text)
        return image
    return image if turn is None else image.transpose(turn)


def _flat(
    image: Image.Image, channels: int, ground: Colour, name: str, notices: Notices
) -> Image.Image:
    """8 bits, grey or RGB, without alpha."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep(image, name, notices)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            notices.say(
                "alpha",
                f"{name} has transparent pixels: they are laid on a background, {_hex(ground)}",
            )
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*ground, 255)), image)
    if image.mode not in ("1", "L", "LA"):
        image = image.convert("RGB")  # there is no direct way from LAB or HSV to grey
    return image.convert("L" if channels == 1 else "RGB")


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{value:02x}" for value in colour)


def _deep(image: Image.Image, name: str, notices: Notices) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, with 8 bits; a transparent level becomes alpha."""
    values, key = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray(_levels(values, name, notices))
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, np.uint8(0), np.uint8(255))))
    return grey


def _levels(values: NDArray[Any], name: str, notices: Notices) -> NDArray[np.uint8]:
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # NaN, too
            raise DataError(
                f"{name} has floating-point pixels from {low:.4g} to {high:.4g}, which must be in "
                f"[0, 1]: {scale_remedy(low, high)}"
            )
        notices.say("depth", f"{name} has floating-point pixels: they are rounded to 8 bits")
        return np.rint(values * np.float32(255)).astype(np.uint8)
    if low < 0 or high > 65535:
        raise DataError(
            f"{name} has whole numbers from {low} to {high} as pixels, which must be in [0, 65535]:"
            " save it with 8 or 16 bits"
        )
    if 0 < high < _DARK:
        bits = max(8, int(high).bit_length())
        notices.say(
            "dark",
            f"{name} has 16-bit pixels, none above {high} of 65535, and is read as nearly black; "
            f"if they hold {bits} bits, multiply them by {2 ** (16 - bits)} first",
        )
    notices.say("depth", f"{name} has 16-bit pixels: their high byte is taken")
    return (values >> 8).astype(np.uint8)
