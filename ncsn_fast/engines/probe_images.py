"""Two images with the statistics of photographs, for checks of engines."""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image

from ncsn_fast.ops import noise

_HEIGHT, _WIDTH = 240, 360
_RADII = (3.0, 120.0)  # smallest and largest, in pixels
_LEAVES = 1600  # cover the image more than three times


@functools.cache
def probe_images() -> tuple[Image.Image, Image.Image]:
    """Returns two RGB images, the same on every machine.

    They are dead leaves: discs of random colours that hide each other, with radii of density
    proportional to r^-3. Such images have the edges, the flat regions and the power spectrum (about
    1/f^2) of photographs (Lee, Mumford and Huang 2001, "Occlusion models for natural images").
    """
    first, second = (_dead_leaves(index) for index in range(2))
    return first, second


def _dead_leaves(index: int) -> Image.Image:
    u = noise.uniform(0, torch.tensor([index]), noise.Stream.INITIAL, 0, (_LEAVES, 7))[0].numpy()
    small, large = (radius**-2 for radius in _RADII)
    radii = (small - u[:, 0] * (small - large)) ** -0.5
    centres = u[:, 1:3] * (_HEIGHT, _WIDTH)
    brightness, tints = u[:, 3:4], u[:, 4:7] - 0.5
    colours = (255 * np.clip(brightness + 0.3 * tints, 0, 1)).round().astype(np.uint8)
    pixels = np.full((_HEIGHT, _WIDTH, 3), 127, np.uint8)
    for radius, (y, x), colour in zip(radii, centres, colours, strict=True):
        top, left = max(int(y - radius), 0), max(int(x - radius), 0)
        part = pixels[top : int(y + radius) + 2, left : int(x + radius) + 2]
        rows, columns = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
        part[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = colour
    return Image.fromarray(pixels)
