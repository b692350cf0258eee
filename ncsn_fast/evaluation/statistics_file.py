"""Reference statistics in .npz files, read without believing what they declare."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ncsn_fast.data import limits
from ncsn_fast.data.files import atomic_write, open_regular
from ncsn_fast.evaluation.features import Extractor
from ncsn_fast.evaluation.metrics import Statistics

_MOST_HEADER = 2**12  # bytes before the numbers of an entry
_REAL, _TEXT = "fiu", "U"  # kinds of numpy types
_MOST_BYTES = {_REAL: 16, _TEXT: 1024}  # of one element
_LARGEST = 1e100  # of a number, lest products overflow


def save_statistics(path: Path, statistics: Statistics, extractor: Extractor) -> None:
    """Writes mu and sigma, under their usual names, with n and what extracted the features."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            mu=statistics.mu,
            sigma=statistics.sigma,
            n=np.int64(statistics.n),
            extractor=np.str_(extractor.name),
            extractor_sha256=np.str_(extractor.sha256),
        )


def load_statistics(path: Path, extractor: Extractor) -> Statistics:
    """Statistics from an npz file with `mu` and `sigma`; nothing in it is ever unpickled.

    Entries are read whose declared shapes are those of the extractor's statistics, and no others.

    ValueError unless they are finite, of the extractor's shape, sigma is symmetric and, where the
    file says what extracted the features, it was this extractor.
    """
    width = extractor.num_features
    try:
        with open_regular(path, limits.WEIGHTS_BYTES) as file, zipfile.ZipFile(file) as archive:
            mu = _entry(archive, "mu", (width,), _REAL)
            sigma = _entry(archive, "sigma", (width, width), _REAL)
            n, name, by = (
                None if f"{key}.npy" not in archive.namelist() else _entry(archive, key, (), kinds)
                for key, kinds in (("n", _REAL), ("extractor", _TEXT), ("extractor_sha256", _TEXT))
            )
        statistics = Statistics(mu.astype(np.float64), sigma.astype(np.float64), _count(n))
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot read {path} as an npz file of mu and sigma for extractor {extractor.name}, "
            f"which has {width} features: {reason}"
        ) from error
    _check(statistics, path)
    if by is not None and str(by) not in ("", extractor.sha256):
        raise ValueError(
            f"{path} was made with extractor {name} (sha256 {str(by)[:12]}), not with "
            f"{extractor.name} ({extractor.sha256[:12]}); give that one, or other statistics"
        )
    return statistics


def _entry(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], kinds: str) -> NDArray[Any]:
    """An array of an archive; ValueError unless it declares this shape and one of these kinds."""
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError as error:
        raise ValueError(f"it has no {name}") from error
    with archive.open(info) as file:
        found, dtype = _header(file.read(_MOST_HEADER))
    if found != shape or dtype.kind not in kinds:
        kind = "text" if kinds == _TEXT else "real numbers"
        raise ValueError(f"{name} must be {kind} of shape {shape}; got {dtype} of shape {found}")
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size < info.file_size < size + _MOST_HEADER or dtype.itemsize > _MOST_BYTES[kinds]:
        raise ValueError(f"{name} has {info.file_size} bytes, which do not fit its shape and type")
    with archive.open(info) as file:
        return npy.read_array(file, allow_pickle=False, max_header_size=_MOST_HEADER)


def _header(start: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type that the first bytes of an .npy file declare."""
    file = io.BytesIO(start)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise ValueError(f"there is no .npy version {version}")
    shape, _, dtype = readers[version](file, max_header_size=_MOST_HEADER)
    return shape, dtype


def _count(n: NDArray[Any] | None) -> int:
    """Number of images; 0 where it is unknown."""
    value = 0.0 if n is None else float(n)
    if not (value.is_integer() and 0 <= value < 2**53):
        raise ValueError(f"n must be a number of images; got {value}")
    return int(value)


def _check(statistics: Statistics, path: Path) -> None:
    """ValueError unless these are a mean and a covariance."""
    mu, sigma = statistics.mu, statistics.sigma
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path} holds NaN or infinite values")
    scale = np.abs(sigma).max()
    if max(scale, np.abs(mu).max()) > _LARGEST:
        raise ValueError(f"{path} holds numbers beyond {_LARGEST:g}, which no features have")
    if np.abs(sigma - sigma.T).max() > 1e-6 * scale or sigma.diagonal().min() < -1e-6 * scale:
        raise ValueError(f"{path}: sigma is no covariance: it must be symmetric, its diagonal >= 0")
