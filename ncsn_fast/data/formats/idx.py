"""IDX files: MNIST, Fashion-MNIST, KMNIST, EMNIST; gzipped or not.

A file is two zero bytes, a type (0x08: uint8), the number of dimensions, each dimension as a
big-endian uint32, and the values (http://yann.lecun.com/exdb/mnist). The images of EMNIST are
stored transposed, and are transposed back.
"""

from __future__ import annotations

import logging
import math
import re
import struct
from pathlib import Path

import numpy as np
from torch import Tensor

from ncsn_fast.data.decode import DataError, printable
from ncsn_fast.data.formats.arrays import ArrayImages, UInt8
from ncsn_fast.data.formats.base import Format, Images, check_labels
from ncsn_fast.data.formats.unpacking import GZIP_ERRORS, Bytes, open_unpacked
from ncsn_fast.data.limits import DATA_BYTES
from ncsn_fast.data.transform import Transform

log = logging.getLogger(__name__)
_UINT8 = 0x08
_TYPES = {9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
_KINDS = tuple(bytes([kind]) for kind in (_UINT8, *_TYPES))
_SPLITS = {"train": ("train",), "test": ("t10k", "test")}  # in the names of their files
_IMAGES = re.compile(r"(?P<name>.*)images[-.]idx3-ubyte(\.gz)?", re.IGNORECASE)
_TRANSPOSED = "emnist-"


def recognises(path: Path) -> bool:
    """Whether a file begins as IDX does, or a folder holds files with the names of MNIST's."""
    if path.is_dir():
        return bool(_image_files(path))
    if not path.is_file():
        return False
    first = _first_bytes(path)
    typed = first[:2] == b"\0\0" and first[2:3] in _KINDS
    return typed or _IMAGES.fullmatch(path.name) is not None


def open_idx(path: Path, split: str, transform: Transform) -> Images:
    """Opens the images of a split, train by default, with their labels if those lie beside them."""
    file = _choose(path, split) if path.is_dir() else path
    if split and file == path:
        raise DataError(
            f"{path} is one file, and has no split {split!r}: give the split's own file, or the "
            "folder that holds them all"
        )
    images = read_idx(file)
    if images.ndim != 3:
        raise DataError(
            f"{file} has {images.ndim} dimension{'s' * (images.ndim != 1)}, and images have 3 "
            "(number, height, width); give the images' file, such as train-images-idx3-ubyte.gz"
        )
    if 0 in images.shape:
        raise DataError(f"{file} holds no images: its dimensions are {images.shape}")
    if file.name.lower().startswith(_TRANSPOSED):
        log.info("%s: EMNIST stores images transposed; they are transposed back", file)
        images = images.transpose(0, 2, 1)
    labels, classes = _labels(file, len(images))
    labelled = f"labels of {len(classes)} classes" if classes else "no labels beside them"
    log.info("%s: %d images of %dx%d, %s", file, *images.shape, labelled)
    found = ArrayImages(images, "NHW", transform, str(file), labels=labels, classes=classes)
    return found.in_memory()


def read_idx(path: Path) -> UInt8:
    """Reads an IDX file of uint8 values.

    Raises:
        DataError: it is damaged, of another type, or declares more than the limit.
    """
    try:
        with open_unpacked(path) as file:
            return _parse(file, path)
    except GZIP_ERRORS as error:
        reason = printable(str(error)).rstrip(".")
        raise DataError(f"cannot read {path}: {reason}; is the download complete?") from error


def _first_bytes(path: Path) -> bytes:
    try:
        with open_unpacked(path) as file:
            return file.read(4)
    except GZIP_ERRORS:
        return b""


def _parse(file: Bytes, path: Path) -> UInt8:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(
            f"{path} is no IDX file: it begins with {magic.hex() or 'nothing'}, and IDX with 0000"
        )
    kind, n_dims = magic[2:]
    if kind != _UINT8:
        raise DataError(
            f"{path} holds values of type {_TYPES.get(kind, hex(kind))}, and images and labels "
            "must be uint8 (0x08)"
        )
    header = file.read(4 * n_dims)
    if len(header) < 4 * n_dims or not n_dims:
        raise DataError(f"{path} ends in its header; is the download complete?")
    shape = struct.unpack(f">{n_dims}I", header)
    size = math.prod(shape)
    DATA_BYTES.check(size, str(path), DataError)
    values = file.read(size + 1)
    if len(values) != size:
        held = f"only {len(values):,} bytes" if len(values) < size else "more"
        declared = " x ".join(map(str, shape))
        raise DataError(f"{path} declares {declared} bytes, and holds {held}: download it again")
    return np.frombuffer(bytearray(values), np.uint8).reshape(shape)


def _image_files(folder: Path) -> list[Path]:
    """Finds the files of images in a folder, or below it where torchvision keeps them."""
    for place in (folder, folder / "raw", *sorted(folder.glob("*/raw"))):
        if place.is_dir():
            found = [p for p in place.iterdir() if _IMAGES.fullmatch(p.name) and p.is_file()]
            if found:
                return sorted(found)
    return []


def _choose(folder: Path, split: str) -> Path:
    """Chooses the file of a split's images; of one that is there twice, the unpacked one."""
    split = split or "train"
    if split not in _SPLITS:
        raise DataError(f"{folder} has no split {split!r}; its splits are {', '.join(_SPLITS)}")
    files = _image_files(folder)
    of_split = {
        path.name.removesuffix(".gz"): path
        for path in reversed(files)  # so that the unpacked file comes last, and is taken
        if any(word in re.split(r"[-_.]", path.name.lower()) for word in _SPLITS[split])
    }
    if len(of_split) == 1:
        return next(iter(of_split.values()))
    names = ", ".join(path.name for path in files)
    if not of_split:
        raise DataError(f"{folder} holds no file of the split {split!r}; it holds {names}")
    raise DataError(
        f"{folder} holds several data sets ({names}): give one of these files, or a folder that "
        "holds one data set"
    )


def _labels(images: Path, n: int) -> tuple[Tensor | None, tuple[str, ...]]:
    """Reads the labels that lie beside a file of images, and names the classes."""
    match = _IMAGES.fullmatch(images.name)
    if match is None:
        return None, ()
    name = match["name"]
    names = {f"{name}labels{mark}idx1-ubyte{end}" for mark in "-." for end in ("", ".gz")}
    found = sorted(p for p in images.parent.iterdir() if p.name in names)
    if not found:
        return None, ()
    labels = read_idx(found[0])
    if labels.shape != (n,):
        raise DataError(
            f"{found[0]} holds {' x '.join(map(str, labels.shape))} labels, and {images.name} "
            f"{n} images; they must be of one data set"
        )
    return check_labels(labels, str(found[0]))


FORMAT = Format(
    "IDX files as MNIST's (*-images-idx3-ubyte, gzipped or not), or a folder of them",
    recognises,
    open_idx,
)
