"""CIFAR-10 and CIFAR-100, their "python version": a folder of pickles, or the archive of it.

A batch is a dictionary with data, uint8 (N, 3072), an image as (3, 32, 32), and a list of labels
(https://www.cs.toronto.edu/~kriz/cifar.html). Its pickle is read as data (pickle_data.py): nothing
in it runs. Archives are read in memory; nothing of them is written to disk.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ncsn_fast.data import pickle_data
from ncsn_fast.data.decode import DataError, printable
from ncsn_fast.data.files import open_regular
from ncsn_fast.data.formats.arrays import ArrayImages, UInt8
from ncsn_fast.data.formats.base import Format, Images, check_labels
from ncsn_fast.data.formats.unpacking import GZIP_ERRORS, open_unpacked
from ncsn_fast.data.limits import DATA_BYTES
from ncsn_fast.data.pickle_data import Instance, PickleError
from ncsn_fast.data.transform import Transform

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Names of one of the two data sets: of its folder, files, and entries of a batch."""

    folder: str
    splits: dict[str, tuple[str, ...]]
    meta: str
    labels: str
    names: str

    @property
    def files(self) -> set[str]:
        return {self.meta}.union(*self.splits.values())


KINDS = (
    Kind(
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
        "labels",
        "label_names",
    ),
    Kind(
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        "meta",
        "fine_labels",
        "fine_label_names",
    ),
)
_SIDE = 32
_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_REMEDY = 'download the "python version" again'


def recognises(path: Path) -> bool:
    """Whether a path is a tar archive, or a folder with the names of CIFAR's batches."""
    if path.is_dir():
        return bool(_folders(path))
    return path.name.lower().endswith(_SUFFIXES) and path.is_file()


def open_cifar(path: Path, split: str, transform: Transform) -> Images:
    """Opens a split, train by default, with its labels; of CIFAR-100 the fine ones."""
    split = split or "train"
    kind, files = _read_folder(path, split) if path.is_dir() else _read_tar(path, split)
    found = {name: _unpickle(content, f"{path}: {name}") for name, content in files.items()}
    batches = [_batch(found[name], kind, f"{path}: {name}") for name in kind.splits[split]]
    images = np.concatenate([data for data, _ in batches])
    labels, classes = check_labels(np.concatenate([labels for _, labels in batches]), str(path))
    classes = _class_names(found.get(kind.meta), kind, len(classes)) or classes
    log.info("%s: %d images, labels of %d classes", path, len(images), len(classes))
    return ArrayImages(
        images, "NCHW", transform, str(path), labels=labels, classes=classes
    ).in_memory()


def _holds(folder: Path, kind: Kind) -> bool:
    """Whether a folder has the batches of a split, and the file with the names of classes."""
    # A folder with a file "train" alone may be anything.
    ends = kind.meta == "batches.meta" or (folder / kind.meta).is_file()
    return ends and any((folder / names[0]).is_file() for names in kind.splits.values())


def _folders(path: Path) -> list[tuple[Path, Kind]]:
    """Finds the folders of batches: `path` itself, or below it by their published names."""
    return [(path, kind) for kind in KINDS if _holds(path, kind)] or [
        (path / kind.folder, kind) for kind in KINDS if _holds(path / kind.folder, kind)
    ]


def _read_folder(path: Path, split: str) -> tuple[Kind, dict[str, bytes]]:
    found = _folders(path)
    if len(found) > 1:
        names = " and ".join(str(folder) for folder, _ in found)
        raise DataError(f"{path} holds two data sets: give {names} itself")
    ((folder, kind),) = found
    _check_split(path, split, kind)
    files = {}
    for name in (*kind.splits[split], kind.meta):
        try:
            with open_regular(folder / name, DATA_BYTES) as file:
                files[name] = file.read()
        except OSError as error:
            if name != kind.meta:
                reason = error.strerror or str(error)
                raise DataError(f"cannot read {folder / name}: {reason}; {_REMEDY}") from error
    return kind, files


def _read_tar(path: Path, split: str) -> tuple[Kind, dict[str, bytes]]:
    """Reads the files of a split from an archive."""
    wanted = {name for kind in KINDS for name in (*kind.splits.get(split, ()), kind.meta)}
    names: set[str] = set()
    files: dict[str, bytes] = {}
    total = 0
    try:
        with open_unpacked(path) as packed, tarfile.open(fileobj=packed, mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isdir() or not any(name in kind.files for kind in KINDS):
                    continue
                _check_member(member, f"{path}!{printable(member.name)}")
                if name in names:
                    raise DataError(f"{path} holds two files {name}: {_REMEDY}")
                names.add(name)
                total += member.size
                DATA_BYTES.check(total, str(path), DataError)
                if name in wanted:
                    file = archive.extractfile(member)
                    files[name] = b"" if file is None else file.read()
    except (*GZIP_ERRORS, tarfile.TarError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = printable(str(error)).rstrip(".")
        raise DataError(f"cannot read {path}: {reason}; is the download complete?") from error
    kinds = [kind for kind in KINDS if names & set().union(*kind.splits.values())]
    if len(kinds) != 1:
        raise DataError(
            f"{path} holds no batches of CIFAR-10 or CIFAR-100 (python version); unpack other "
            "archives, and give the folder"
        )
    _check_split(path, split, kinds[0])
    lacking = sorted(set(kinds[0].splits[split]) - set(files))
    if lacking:
        raise DataError(f"{path} lacks {', '.join(lacking)}: {_REMEDY}")
    return kinds[0], files


def _check_member(member: tarfile.TarInfo, where: str) -> None:
    place = PurePosixPath(member.name)
    if not member.isreg():
        raise DataError(f"{where} is a link or device, and no file: {_REMEDY}")
    if place.is_absolute() or ".." in place.parts:
        raise DataError(f"{where} lies outside of the archive: {_REMEDY}")


def _check_split(path: Path, split: str, kind: Kind) -> None:
    if split not in kind.splits:
        raise DataError(f"{path} has no split {split!r}; its splits are {', '.join(kind.splits)}")


def _array_class(*arguments: Any) -> Any:
    raise PickleError("it calls numpy.ndarray")


def _encode(text: Any, encoding: Any = "") -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise PickleError("it encodes something else than bytes")
    return text.encode("latin1")


_BUILDERS: dict[str, pickle_data.Builder] = {
    "numpy.core.multiarray._reconstruct": pickle_data.instance_of("array"),
    "numpy._core.multiarray._reconstruct": pickle_data.instance_of("array"),
    "numpy.ndarray": _array_class,
    "numpy.dtype": pickle_data.instance_of("dtype"),
    "_codecs.encode": _encode,  # bytes, as Python 3 writes them for Python 2
}


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    """Reads a dictionary of arrays and plain data."""
    try:
        found = pickle_data.load(io.BytesIO(content), _BUILDERS)
        if not isinstance(found, dict):
            raise PickleError(f"it is a {type(found).__name__}, and no dictionary")
        return {_text(name): value for name, value in found.items()}
    except PickleError as error:
        raise DataError(
            f"{where} holds more than a batch of CIFAR, or another thing ({error}), and reading it "
            f"could run code: refused; {_REMEDY}"
        ) from error
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        reason = printable(str(error).strip() or type(error).__name__)
        raise DataError(f"cannot read {where} ({reason:.200}): {_REMEDY}") from error


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _batch(batch: dict[str, Any], kind: Kind, where: str) -> tuple[UInt8, np.ndarray[Any, Any]]:
    """Returns the images (N, 3, 32, 32) and labels (N,) of a batch."""
    values = _values(batch.get("data"), where)
    labels = batch.get(kind.labels)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{where} has no list of integers {kind.labels!r}: {_REMEDY}")
    if len(labels) != len(values):
        raise DataError(f"{where} has {len(values)} images and {len(labels)} labels: {_REMEDY}")
    if not labels:
        raise DataError(f"{where} holds no images: {_REMEDY}")
    if not 0 <= min(labels) <= max(labels) < 2**31:
        raise DataError(f"{where} has labels from {min(labels)} to {max(labels)}: {_REMEDY}")
    return values.reshape(-1, 3, _SIDE, _SIDE), np.array(labels, np.int64)


def _values(array: Any, where: str) -> UInt8:
    """Returns the array (N, 3072) of uint8 that a pickle describes."""
    width = 3 * _SIDE**2
    match array:
        case Instance(kind="array", state=(1, (int(n), int(found)), dtype, bool(fortran), content)):
            pass
        case _:
            raise DataError(f"{where} has no array 'data' of images: {_REMEDY}")
    kind = dtype.arguments[:1] if isinstance(dtype, Instance) and dtype.kind == "dtype" else ()
    if kind not in (("u1",), ("|u1",), (b"u1",), (b"|u1",)) or found != width:
        raise DataError(f"{where}: images must be uint8 (N, {width}); {_REMEDY}")
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(content, bytes) or n < 0 or len(content) != n * width:
        raise DataError(f"{where} does not hold the {n} images that it declares: {_REMEDY}")
    order = (width, n) if fortran else (n, width)
    values = np.frombuffer(content, np.uint8).reshape(order)
    return values.T if fortran else values


def _class_names(meta: dict[str, Any] | None, kind: Kind, least: int) -> tuple[str, ...]:
    """Returns the names of the classes; none if they are fewer than the labels need."""
    names: Iterable[Any] = (meta or {}).get(kind.names, ())
    found = tuple(printable(_text(name)) for name in names) if isinstance(names, list) else ()
    return found if len(found) >= least else ()


FORMAT = Format(
    'the folder or .tar.gz of CIFAR-10 or CIFAR-100 ("python version")', recognises, open_cifar
)
