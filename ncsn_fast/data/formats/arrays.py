"""Data sets that are one array of images, in memory or mapped from a file: IDX, CIFAR, NumPy."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ncsn_fast.data.decode import DataError
from ncsn_fast.data.formats.base import KEPT_BYTES, Images, MemoryImages
from ncsn_fast.data.limits import DATA_BYTES
from ncsn_fast.data.transform import Transform

log = logging.getLogger(__name__)
UInt8 = NDArray[np.uint8]
Layout = Literal["NHW", "NHWC", "NCHW"]
_CHUNK = 256  # images converted at once


@dataclasses.dataclass
class ArrayImages:
    """Data set that converts the images of an array when they are asked for.

    Images that have the size and channels already are taken as they are.

    Attributes:
        array: uint8 or floating point, in the order of `layout`; C is 1 or 3.
        name: for messages; the file of a mapped array.
        low: 0 or -1, the end of the range [low, 1] of floating-point values.
    """

    array: NDArray[Any]
    layout: Layout
    transform: Transform
    name: str
    low: int = 0
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.chunk(index, index + 1)[0]

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned, not forked
        mapped = isinstance(self.array, np.memmap)
        return {**vars(self), "array": None} if mapped else vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.array is None:
            self.array = np.load(self.name, mmap_mode="r", allow_pickle=False)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the array's images."""
        height, width = self.array.shape[2:] if self.layout == "NCHW" else self.array.shape[1:3]
        return height, width

    def as_they_are(self) -> bool:
        """Whether images have the size of the data set, so that they are not resized."""
        size, crop = self.transform.size, self.transform.centre_crop
        return self.image_size == (size, size) and not 0 < crop < size

    def chunk(self, start: int, stop: int) -> Tensor:
        """Converts some of the images to uint8 (N, C, S, S)."""
        images = self._levels(self.array[start:stop])
        if self.layout == "NHW":
            images = images[..., None]
        elif self.layout == "NCHW":
            images = images.transpose(0, 2, 3, 1)
        given, channels = images.shape[3], self.transform.channels
        if self.as_they_are() and given in (1, channels):
            planes = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))
            return planes if given == channels else planes.repeat(1, channels, 1, 1)
        pictures = (Image.fromarray(image[..., 0] if given == 1 else image) for image in images)
        return torch.stack(
            [self.transform(p, f"{self.name}[{start + i}]") for i, p in enumerate(pictures)]
        )

    def _levels(self, values: NDArray[Any]) -> UInt8:
        if values.dtype == np.uint8:
            return np.ascontiguousarray(values)
        values = values.astype(np.float32)
        return np.rint(values * 255 if self.low == 0 else (values + 1) * 127.5).astype(np.uint8)

    def in_memory(self) -> MemoryImages:
        """Converts all images.

        Raises:
            DataError: they are more than the limit.
        """
        n, size, channels = len(self), self.transform.size, self.transform.channels
        DATA_BYTES.check(n * channels * size**2, f"{self.name} at {size}x{size}", DataError)
        if not self.as_they_are():
            sides = "{}x{}".format(*self.image_size)
            log.info("%s: images of %s are resized to %dx%d", self.name, sides, size, size)
        result = torch.empty(n, channels, size, size, dtype=torch.uint8)
        with tqdm(total=n, desc="reading images", unit="image", delay=2, leave=False) as bar:
            for start in range(0, n, _CHUNK):
                result[start : start + _CHUNK] = self.chunk(start, min(start + _CHUNK, n))
                bar.update(min(_CHUNK, n - start))
        return MemoryImages(result, self.labels, self.classes)

    def kept(self) -> Images:
        """Returns the data set in memory if it has at most KEPT_BYTES, else as it is."""
        size = len(self) * self.transform.channels * self.transform.size**2
        return self.in_memory() if size <= KEPT_BYTES else self
