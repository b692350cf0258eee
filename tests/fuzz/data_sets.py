"""Damaged data sets in one file: IDX, NumPy's .npy and .npz, CIFAR's pickles and archives."""

from __future__ import annotations

import functools
import gzip
import io
import os
import pickle
import random
import struct
import tarfile
from collections.abc import Callable
from unittest import mock

import harness
import mutations
import numpy as np

from ncsn_fast.data import datasets
from ncsn_fast.data.decode import DataError

N, SIDE = 3, 6
# Lower than the package's, so that a run is about parsers and not memory.
BOUNDS = {"NCSN_FAST_MAX_DATA_BYTES": str(2**18), "NCSN_FAST_MAX_PIXELS": str(10**5)}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _idx(draw: random.Random) -> bytes:
    array = noise(N, SIDE, SIDE) if draw.random() < 0.8 else noise(N)
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    kind = draw.random()
    if kind < 0.2:  # what unpacks to something else than IDX
        return gzip.compress(mutations.damaged(content, draw), mtime=0)
    if kind < 0.4:
        return mutations.damaged(gzip.compress(content, mtime=0), draw)
    return mutations.damaged(content, draw)


def _array(draw: random.Random) -> np.ndarray:
    images = draw.choice((noise(N, SIDE, SIDE), noise(N, SIDE, SIDE, 3), noise(N, 3, SIDE, SIDE)))
    return draw.choice((images, images / 255, (images / 127.5 - 1).astype(np.float32)))


def _npy(draw: random.Random) -> bytes:
    file = io.BytesIO()
    odd = draw.random() < 0.5
    array = mutations.odd_array(_array(draw), draw) if odd else _array(draw)
    np.save(file, array, allow_pickle=True)
    return file.getvalue() if odd else mutations.damaged(file.getvalue(), draw)


def _npz(draw: random.Random) -> bytes:
    arrays = {"images": _array(draw), "labels": np.arange(N) % 2}
    name, file = draw.choice(list(arrays)), io.BytesIO()
    if draw.random() < 0.4:
        arrays[name] = mutations.odd_array(arrays[name], draw)
    elif draw.random() < 0.2:
        arrays[draw.choice(("x", "data", "x_test", "labels"))] = arrays.pop(name)
    (np.savez_compressed if draw.random() < 0.3 else np.savez)(file, **arrays)
    kind = draw.random()
    if kind < 0.3:
        return mutations.damaged(file.getvalue(), draw)
    return mutations.damaged_zip(file.getvalue(), draw) if kind < 0.5 else file.getvalue()


def _batch(draw: random.Random) -> bytes:
    batch = {"data": noise(2, 3072), "fine_labels": [1, 0], "filenames": ["a", "b"]}
    protocol = draw.choice((0, 2, 4))
    if draw.random() < 0.5:
        name = draw.choice(list(batch))
        if name == "data":
            batch[name] = mutations.odd_array(batch[name], draw)
        else:
            batch = mutations.damaged_tree(batch, draw)
        return pickle.dumps(batch, protocol)
    return mutations.damaged(pickle.dumps(batch, protocol), draw)


def _tar(draw: random.Random) -> bytes:
    file, content = io.BytesIO(), pickle.dumps({"fine_labels": [1], "data": noise(1, 3072)}, 2)
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in draw.sample(("cifar-100-python/train", "cifar-100-python/meta", "x/../train",
                                 "cifar-100-python/test", "ä" * 120, "/train"), 3):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.type = draw.choice((tarfile.REGTYPE,) * 6 + (tarfile.SYMTYPE, tarfile.LNKTYPE))
            archive.addfile(info, io.BytesIO(content))
    content = file.getvalue()
    if draw.random() < 0.5:
        return gzip.compress(mutations.damaged(content, draw), mtime=0)
    return mutations.damaged(content, draw) if draw.random() < 0.8 else content


MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "train-images-idx3-ubyte": _idx, "a.npy": _npy, "a.npz": _npz, "train": _batch, "a.tar": _tar
}  # fmt: skip


def mutate(seed: int) -> bytes:
    """Makes a damaged file, after a byte that says which it is."""
    draw = random.Random(seed)
    kind = draw.randrange(len(MAKERS))
    return bytes([kind]) + MAKERS[list(MAKERS)[kind]](draw)


@functools.cache
def meta() -> bytes:
    return pickle.dumps({"fine_label_names": ["ant", "bee"]}, 2)


def check(content: bytes) -> dict[str, bool]:
    """Opens one data set, and reads its images."""
    name = list(MAKERS)[content[0] % len(MAKERS)]
    folder = harness.folder() / "data set"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content[1:])
    if name == "train":
        (folder / "meta").write_bytes(meta())

    def read() -> None:
        for channels in (1, 3):
            images = datasets.open_images(source, size=8, channels=channels)
            found = datasets.stack(images)
            if found.shape[1:] != (channels, 8, 8) or len(found) != len(images):
                raise ArithmeticError(f"images of shape {tuple(found.shape)}")
            labels = images.labels
            if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < len(
                images.classes
            ):
                raise ArithmeticError("labels beyond the classes")

    source = folder if name == "train" else path
    try:
        with mock.patch.dict(os.environ, BOUNDS):
            return {name: harness.reads(name, read, (DataError,), folder.name)}
    finally:
        for file in folder.iterdir():
            file.unlink()
