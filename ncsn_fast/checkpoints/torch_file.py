"""Files of torch.save, read without running code, and the error for all unusable model files."""

from __future__ import annotations

import mmap
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from ncsn_fast.data import limits
from ncsn_fast.data.files import open_regular

_ZIP_MAGIC = b"PK\x03\x04"
# How other files begin that are taken for checkpoints, and what they are.
_OTHERS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: run git lfs pull"),
    (b"<", "is a web page or another text, not the file that was meant: download it again"),
    (b"\x93NUMPY", "holds an array of NumPy, not the weights of a network"),
)
# Calls in a pickle that torch.load allows: bytearray(10**12), and codecs of quadratic time.
_COSTLY = (b"\nbytearray\n", b"c_codecs\nencode\n")

Weights = Literal["ema", "raw"]


class CheckpointError(ValueError):
    """A file that cannot be used as a model; the message says why and what to do."""


def read_torch(path: Path) -> Any:
    """torch.load without code execution, on the CPU; CheckpointError for whatever goes wrong."""
    try:
        with (
            open_regular(path, limits.WEIGHTS_BYTES) as file,
            warnings.catch_warnings(action="ignore"),  # about odd pickles: refused or fine
        ):
            _check_kind(file, path)
            _check_records(file)
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors (or is no checkpoint), and reading it could run code: "
            "refused. Re-save its state dicts with torch.save."
        ) from error
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot read {path} as a torch checkpoint ({reason}); is the file complete?"
        ) from error


def _check_kind(file: BinaryIO, path: Path) -> None:
    """Raises CheckpointError for a file of another kind, by its name or its first bytes."""
    start = file.read(64).lstrip()
    file.seek(0)
    for beginning, what in _OTHERS:
        if start.startswith(beginning):
            raise CheckpointError(f"{path} {what}")
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"{path} is an exported graph, which runs with the model that it is of: "
            "Sampler(model, engine='ort', onnx=path)"
        )
    if start.startswith(_ZIP_MAGIC):
        with zipfile.ZipFile(file) as archive:
            script = any("/code/" in name for name in archive.namelist())
        file.seek(0)
        if script:
            raise CheckpointError(
                f"{path} is of TorchScript, which is code and is not read: save the state_dict() "
                "of the module with torch.save"
            )


def _check_records(file: BinaryIO) -> None:
    """Raises ValueError for a file that takes more memory or time than its size allows.

    That is an archive with compressed records, or with records that share their bytes, and a pickle
    with one of _COSTLY, which torch.load would call.
    """
    if file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC:
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("its records are compressed, which torch.save never does")
            if sum(record.file_size for record in records) > size:
                raise ValueError("its records claim more bytes than the file has")
            pickles = [archive.read(r) for r in records if r.filename.endswith("data.pkl")]
        costly = any(call in pickled for pickled in pickles for call in _COSTLY)
    else:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            costly = any(content.find(call) >= 0 for call in _COSTLY)
    if costly:
        raise ValueError("it holds bytes, which no state dict does")
    file.seek(0)


def check_tensors(entry: Any, where: str) -> dict[str, Tensor]:
    """`entry` if it is a state dict of plain dense tensors, else CheckpointError."""
    if not isinstance(entry, dict) or not entry:
        raise CheckpointError(f"{where} is not a state dict of tensors")
    for key, value in entry.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{where} is not a state dict of tensors: see its entry {key!r}")
        if not is_plain(value):
            raise CheckpointError(f"{where}: {key} is not a plain dense tensor; re-save the file")
    return entry


def is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is dense, in memory, and all of its numbers are there.

    A view that repeats few numbers would make a small file ask for any amount of memory.
    """
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def key_differences(expected: Iterable[str], found: Iterable[str]) -> str:
    """Names the first keys that are missing and unexpected; empty if there are none."""
    missing, extra = set(expected) - set(found), set(found) - set(expected)
    kinds = (("missing", sorted(missing)), ("unexpected", sorted(extra)))
    return "; ".join(f"{kind} {_some(keys)}" for kind, keys in kinds if keys)


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
