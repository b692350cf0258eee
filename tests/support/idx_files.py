"""Folders with the names and format of MNIST's, of the digits that scikit-learn carries."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from ncsn_fast.data import datasets


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """Returns an array as an IDX file."""
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


def folder_of_digits(folder: Path, n: int = 200, size: int = 28) -> Path:
    """Writes n training digits and n held-out ones as MNIST's four files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train"), ("held-out", "t10k")):
        images, labels = datasets.digits(split, size)
        files = {
            f"{name}-images-idx3-ubyte.gz": images[:n, 0].numpy(),
            f"{name}-labels-idx1-ubyte.gz": labels[:n].numpy().astype(np.uint8),
        }
        for path, array in files.items():
            (folder / path).write_bytes(gzip.compress(idx(array)))
    return folder
