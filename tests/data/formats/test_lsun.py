"""LMDB databases of encoded images: sound, of other things, cut, and without the package."""

import io
import itertools
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import DataError
from ncsn_fast.data.loader import batches

lmdb = pytest.importorskip("lmdb")
KEYS = (b"f1", b"a0", b"0c", b"zz", b"9")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8))


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "WEBP", lossless=True)
    return file.getvalue()


def write(folder: Path, values: dict[bytes, bytes]) -> Path:
    with (
        lmdb.open(str(folder), map_size=2**24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in values.items():
            transaction.put(key, value)
    return folder


def opened(source):
    return datasets.open_images(source, size=6, channels=3)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return write(tmp_path / "church_lmdb", {key: encoded(i) for i, key in enumerate(KEYS)})


def test_images_in_the_order_of_their_keys(database):
    images = opened(database)
    assert images.labels is None
    order = sorted(range(len(KEYS)), key=lambda i: KEYS[i])
    expected = torch.stack([images.transform(picture(i)) for i in order])
    assert torch.equal(datasets.stack(images), expected)
    assert torch.equal(datasets.stack(opened(database / "data.mdb")), expected)
    assert torch.equal(datasets.stack(pickle.loads(pickle.dumps(images))), expected)


@pytest.mark.slow
def test_workers_change_nothing(database):
    here = list(itertools.islice(batches(opened(database), 2, seed=3), 5))
    there = list(itertools.islice(batches(opened(database), 2, seed=3, workers=1), 5))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_databases_of_other_things(tmp_path):
    other = write(tmp_path / "other", {b"a": encoded(0), b"length": b"2"})
    with pytest.raises(DataError, match=r"other\[length\].*must be encoded images, as LSUN's"):
        opened(other)
    with pytest.raises(DataError, match="without entries"):
        opened(write(tmp_path / "empty", {}))
    with pytest.raises(DataError, match="has no split 'val'"):
        opened(f"{other}:val")


def test_damaged_databases(database):
    path = database / "data.mdb"
    content = path.read_bytes()
    path.write_bytes(content[:-4096])
    with pytest.raises(DataError, match=r"data\.mdb has [\d,]+ bytes, and declares .* download"):
        opened(database)
    for broken in (content[:3000], b"", b"hello" * 2000):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"cannot read .*data\.mdb|without entries"):
            opened(database)


def test_values_are_bounded(database, monkeypatch):
    monkeypatch.setenv("NCSN_FAST_MAX_IMAGE_BYTES", "100")
    with pytest.raises(DataError, match=r"church_lmdb\[0c\] declares \d+ bytes"):
        opened(database)


def test_the_package_is_named(database, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match=r"needs the `lmdb` package: pip install"):
        opened(database)
