"""NumPy files: one array of images (.npy), mapped, or arrays of images and labels (.npz).

Images are uint8, or floating point in [0, 1] or [-1, 1]; (N, H, W), (N, H, W, C) or (N, C, H, W)
with C 1 or 3. What was taken is logged. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from ncsn_fast.data.decode import DataError, printable, scale_remedy
from ncsn_fast.data.files import open_regular
from ncsn_fast.data.formats.arrays import ArrayImages, Layout
from ncsn_fast.data.formats.base import Format, Images, check_labels, no_split
from ncsn_fast.data.limits import DATA_BYTES
from ncsn_fast.data.transform import Transform

log = logging.getLogger(__name__)
_IMAGES, _LABELS = ("images", "x", "data", "arr_0"), ("labels", "y", "label", "arr_1")
_MOST_HEADER = 2**14  # characters of an array's header
_SCANNED = 2**22  # values whose range is computed at once

Shapes = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


def recognises(path: Path) -> bool:
    """Whether a file has the suffix .npy or .npz."""
    return path.suffix.lower() in (".npy", ".npz") and path.is_file()


def holds_images(path: Path) -> bool:
    """Whether an .npz file has an array of images; also False if it cannot be read."""
    try:
        with open_regular(path, DATA_BYTES) as file, zipfile.ZipFile(file) as archive:
            return _choose(_shapes(archive), "", str(path)) is not None
    except Exception:  # damaged bytes make the readers raise nearly anything
        return False


def open_numpy(path: Path, split: str, transform: Transform) -> Images:
    """Opens an array of images, with the labels of an .npz file."""
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    if path.suffix.lower() == ".npy":
        no_split(path, split)
        array, name, found = _map(path), str(path), None
    else:
        chosen, array, found = _load(path, split)
        name = f"{path}: {chosen}"
    layout = _layout(array.shape, name)
    if found is not None:
        found = found[:, 0] if found.shape[1:] == (1,) else found
        labels, classes = check_labels(found, str(path))
        if len(labels) != len(array):
            raise DataError(f"{name}: {len(array)} images, but {len(labels)} labels")
    low = _check_values(array, name)
    _report(name, array, layout, low, classes)
    return ArrayImages(array, layout, transform, str(path), low, labels, classes).kept()


def _report(
    name: str, array: NDArray[Any], layout: str, low: int, classes: tuple[str, ...]
) -> None:
    values = "uint8" if array.dtype == np.uint8 else f"{array.dtype} in [{low}, 1]"
    labelled = f", labels of {len(classes)} classes" if classes else ""
    log.info(
        "%s: %d images as %s %s, %s%s", name, len(array), layout, array.shape, values, labelled
    )


def _failed(path: Path, error: Exception) -> DataError:
    reason = printable((str(error) or type(error).__name__).splitlines()[0]).rstrip(".")
    return DataError(f"cannot read {path}: {reason}; save it again, with np.save or np.savez")


def _map(path: Path) -> NDArray[Any]:
    """Maps the array of an .npy file."""
    try:
        with open_regular(path, DATA_BYTES) as file:
            _check_header(str(path), *_header(file))
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        excess = path.stat().st_size - array.offset - array.nbytes
    except DataError:
        raise
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        raise _failed(path, error) from error
    if excess:
        raise DataError(f"{path} holds {excess} bytes more than its array; save it again")
    return array


def _load(path: Path, split: str) -> tuple[str, NDArray[Any], NDArray[Any] | None]:
    """Reads the images of an .npz file, with their name, and the labels if there are any."""
    try:
        with open_regular(path, DATA_BYTES) as file, zipfile.ZipFile(file) as archive:
            shapes = _shapes(archive)
            chosen = _choose(shapes, split, str(path))
            if chosen is None:
                raise DataError(
                    f"{path} holds no array of images{f' of the split {split!r}' * bool(split)}; "
                    f"it holds {_listed(shapes)}. Name the images {' or '.join(_IMAGES)}"
                    f"{f', with _{split}' * bool(split)}"
                )
            labels = _named(shapes, _LABELS, split)
            return (
                chosen,
                _entry(archive, chosen, shapes, path),
                None if labels is None else _entry(archive, labels, shapes, path),
            )
    except DataError:
        raise
    except Exception as error:
        raise _failed(path, error) from error


def _shapes(archive: zipfile.ZipFile) -> Shapes:
    """Reads the shape and type of each array."""
    found: Shapes = {}
    for info in archive.infolist():
        if info.filename.endswith(".npy"):
            with contextlib.suppress(ValueError), archive.open(info) as file:
                found[info.filename.removesuffix(".npy")] = _header(file)
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file, max_header_size=_MOST_HEADER)
    return shape, dtype


def _check_header(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raises DataError for arrays of objects, and for those beyond the limit."""
    if dtype.hasobject:
        raise DataError(
            f"{name} holds Python objects, whose reading could run code: save a plain array of "
            "uint8"
        )
    DATA_BYTES.check(math.prod(shape) * dtype.itemsize, name, DataError)


def _entry(archive: zipfile.ZipFile, name: str, shapes: Shapes, path: Path) -> NDArray[Any]:
    _check_header(f"{path}: {name}", *shapes[name])
    with archive.open(f"{name}.npy") as file:
        array = npy.read_array(file, allow_pickle=False, max_header_size=_MOST_HEADER)
        if file.read(1):
            raise ValueError(f"{name} holds more bytes than its array")
        return array


def _choose(shapes: Shapes, split: str, where: str) -> str | None:
    """Returns the name of the images: a known one, or the only one of 3 or 4 dimensions."""
    if (named := _named(shapes, _IMAGES, split)) is not None:
        return named
    possible = [name for name, (shape, _) in shapes.items() if len(shape) in (3, 4)]
    if split or len(possible) < 2:
        return None if split else next(iter(possible), None)
    raise DataError(
        f"{where} holds several arrays that may be images ({_listed(shapes)}): name them images"
    )


def _named(shapes: Shapes, names: tuple[str, ...], split: str) -> str | None:
    """Returns the first of the names that there is, alone or with the split; train by default."""
    tried = [] if split else list(names)
    for name in names:
        tried += [f"{name}_{split or 'train'}", f"{split or 'train'}_{name}"]
    return next((name for name in tried if name in shapes), None)


def _listed(shapes: Shapes) -> str:
    rows = [f"{printable(name)} {dtype} {shape}" for name, (shape, dtype) in shapes.items()]
    return ", ".join(rows[:8]) + (", ..." if len(rows) > 8 else "") or "nothing"


def _layout(shape: tuple[int, ...], name: str) -> Layout:
    """Returns the order of an array's dimensions, from where its 1 or 3 channels are."""
    if 0 in shape:
        raise DataError(f"{name} holds no images: its shape is {shape}")
    if len(shape) == 3 and shape[2] > 3:
        return "NHW"
    first, last = (len(shape) == 4 and shape[i] in (1, 3) for i in (1, 3))
    if first and last:
        raise DataError(
            f"{name} of shape {shape} may be (N, H, W, C) or (N, C, H, W): make its images larger "
            "than 3 pixels"
        )
    if first or last:
        return "NCHW" if first else "NHWC"
    raise DataError(
        f"{name} must be (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels; got "
        f"{shape}: reshape it, and composite transparent images on a background"
    )


def _check_values(array: NDArray[Any], name: str) -> int:
    """Returns the lower end of the range of the values, 0 or -1.

    Raises:
        DataError: another type, or values beyond both ranges.
    """
    if array.dtype == np.uint8:
        return 0
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise DataError(
            f"{name} must be uint8, or floating point in [0, 1] or [-1, 1]; got {array.dtype}: "
            "convert it with .astype(np.uint8) if its values are 0 to 255"
        )
    low, high = math.inf, -math.inf
    step = max(1, _SCANNED // math.prod(array.shape[1:]))
    for start in range(0, len(array), step):
        chunk = array[start : start + step]
        if not bool(np.isfinite(chunk).all()):
            raise DataError(f"{name} holds values that are not finite, in images from {start} on")
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    if low >= -1 and high <= 1:
        return 0 if low >= 0 else -1
    raise DataError(
        f"{name} is floating point, which must be in [0, 1] or [-1, 1]; got {low:.4g} to "
        f"{high:.4g}: {scale_remedy(low, high)}"
    )


FORMAT = Format(
    "an .npy or .npz file of images (N, H, W), (N, H, W, C) or (N, C, H, W)", recognises, open_numpy
)
