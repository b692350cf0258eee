"""Data sets that are one array of 8-bit images, such as MNIST's: resized if need be, in memory."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ncsn_fast.data.decode import DataError
from ncsn_fast.data.limits import DATA_BYTES
from ncsn_fast.data.transform import Transform

log = logging.getLogger(__name__)
UInt8 = NDArray[np.uint8]


def transformed(images: UInt8, transform: Transform, name: str) -> Tensor:
    """Converts uint8 (N, H, W, C), C 1 or 3, to uint8 (N, channels, size, size).

    Images that have the size and channels already are taken as they are.
    """
    n, height, width, channels = images.shape
    size = transform.size
    DATA_BYTES.check(n * transform.channels * size**2, f"{name} at {size}x{size}", DataError)
    cropped = 0 < transform.centre_crop < max(height, width)
    if (height, width) == (size, size) and not cropped:
        if channels == transform.channels:
            return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        if channels == 1:
            return torch.from_numpy(images).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)
    else:
        log.info("%s: images of %dx%d are resized to %dx%d", name, height, width, size, size)
    result = torch.empty(n, transform.channels, size, size, dtype=torch.uint8)
    for i, image in enumerate(tqdm(images, desc="resizing", unit="image", delay=2, leave=False)):
        picture: Any = image[..., 0] if channels == 1 else image
        result[i] = transform(Image.fromarray(picture), f"{name}[{i}]")
    return result
