"""Samples of a folder, read again."""

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.cli.sample_folder import read_files
from ncsn_fast.data.decode import DataError
from ncsn_fast.data.images import sample_path, save_png

INDICES = [0, 1, 1000]


@pytest.fixture
def folder(tmp_path):
    for i in INDICES:
        save_png(np.full((8, 8, 3), i % 255, np.uint8), sample_path(tmp_path, i))
    return tmp_path


def test_samples_come_in_batches(folder):
    parts = list(read_files(folder, INDICES, (3, 8, 8), size=2))
    assert [len(part) for part in parts] == [2, 1]
    x = torch.cat(parts)
    assert (x.dtype, x.shape) == (torch.float32, (3, 3, 8, 8))
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 1000 % 255]


BROKEN = {
    "empty": b"",
    "text": b"no image",
    "size": None,
    "bomb": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\0\0\0\0\x8b\xa1\x01\xb6",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_samples_are_named_with_a_remedy(folder, case):
    path = sample_path(folder, 1)
    if BROKEN[case] is None:
        Image.new("RGB", (9, 8)).save(path)
    else:
        path.write_bytes(BROKEN[case])
    with pytest.raises(DataError) as raised:
        list(read_files(folder, INDICES, (3, 8, 8)))
    assert str(path) in str(raised.value)
    if case != "bomb":
        assert str(raised.value).endswith("Delete it, and repeat the command: it is drawn again.")


def test_missing_samples_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"000002\.png is missing, though all samples"):
        list(read_files(folder, [2], (3, 8, 8)))
