"""Preprocessing of images: decoding, crop and size, as in the published code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from PIL import Image
from torch import Tensor

from ncsn_fast.data.decode import DataError, WarnOnce, check_channels, decode, parse_colour, pixels
from ncsn_fast.data.limits import PIXELS

_LONGEST = 16  # largest ratio of the sides that is resized before the crop


@dataclasses.dataclass(frozen=True)
class Transform:
    """Preprocessing of the published code: image -> uint8 (channels, size, size).

    `decode` has the rules for modes and colours, `centre_square` for crop and size.
    """

    size: int
    channels: int
    centre_crop: int = 0
    background: str = "white"

    def __post_init__(self) -> None:
        check_channels(self.channels)
        parse_colour(self.background)
        PIXELS.check(self.size**2, f"an image size of {self.size}", DataError)

    def __call__(
        self,
        source: Path | bytes | Image.Image,
        name: str = "the image",
        warn: WarnOnce | None = None,
    ) -> Tensor:
        """Decodes, crops and resizes one image.

        Raises:
            DataError: it cannot be decoded; the message contains its name.
        """
        decoded = decode(
            source,
            self.channels,
            name=name,
            warn=warn or WarnOnce(),
            background=self.background,
        )
        return pixels(centre_square(decoded, self.size, self.centre_crop))


def centre_square(
    image: Image.Image,
    size: int,
    centre_crop: int = 0,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
    """Crops and resizes an image to size x size pixels.

    Centre crop (smaller images are left unchanged), resize of the shorter side to `size`, centre
    crop to a square. Of an image more than 16 times as long as wide only the middle is resized.
    """
    if centre_crop:
        image = _crop(image, *(min(side, centre_crop) for side in image.size))
    short = min(image.size)
    image = _crop(image, *(min(side, _LONGEST * short) for side in image.size))
    if short != size:
        width, height = (side * size // short for side in image.size)
        image = image.resize((width, height), resample)
    return _crop(image, size, size)


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
