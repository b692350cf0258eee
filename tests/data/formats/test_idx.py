"""IDX files: MNIST's, EMNIST's, gzipped or not, damaged."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.cli.arguments import read_images
from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import DataError, MemoryImages, Transform

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


def levels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


def write(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def opened(source, **options) -> MemoryImages:
    images = datasets.open_images(source, **{"size": 7, "channels": 1, **options})
    assert isinstance(images, MemoryImages)
    return images


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder with the names of MNIST's: five images for training, three for testing."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    write(folder / f"{TRAIN}.gz", idx(levels(5, 7, 7)))
    write(folder / "train-labels-idx1-ubyte.gz", idx(np.array([3, 0, 1, 3, 2], np.uint8)))
    write(folder / TEST, idx(levels(3, 7, 7, seed=1)))
    return folder


def test_bytes_are_those_of_the_file(mnist):
    images = opened(mnist)
    assert torch.equal(images.images, torch.from_numpy(levels(5, 1, 7, 7)))
    assert images.labels.tolist() == [3, 0, 1, 3, 2]
    assert images.labels.dtype == torch.int64
    assert images.classes == ("0", "1", "2", "3")
    held_out = opened(f"{mnist}:test")
    assert torch.equal(held_out.images[:, 0], torch.from_numpy(levels(3, 7, 7, seed=1)))
    assert held_out.labels is None
    assert torch.equal(opened(f"{mnist}:train").images, images.images)
    assert torch.equal(opened(mnist / f"{TRAIN}.gz").images, images.images)
    (mnist / "any.name").write_bytes((mnist / TEST).read_bytes())
    assert torch.equal(opened(mnist / "any.name").images, held_out.images)


def test_images_are_cropped_and_resized_as_files_are(mnist):
    first = Image.fromarray(levels(5, 7, 7)[0])
    assert torch.equal(opened(mnist, size=12)[0], Transform(12, 1)(first))
    assert torch.equal(opened(mnist, centre_crop=5)[0], Transform(7, 1, centre_crop=5)(first))
    assert torch.equal(opened(mnist, size=5, channels=3)[0], Transform(5, 3)(first))
    assert torch.equal(opened(mnist, channels=3)[0], opened(mnist)[0].expand(3, 7, 7))


def test_images_that_are_not_square(tmp_path):
    write(tmp_path / TRAIN, idx(levels(2, 5, 9)))
    expected = Transform(5, 1)(Image.fromarray(levels(2, 5, 9)[1]))
    assert torch.equal(opened(tmp_path, size=5)[1], expected)


def test_where_torchvision_keeps_them(mnist, tmp_path):
    (tmp_path / "root" / "MNIST").mkdir(parents=True)
    mnist.rename(tmp_path / "root" / "MNIST" / "raw")
    for folder in ("root", "root/MNIST", "root/MNIST/raw"):
        assert len(opened(tmp_path / folder)) == 5


def test_emnist_is_transposed_back(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("emnist-letters-train", "emnist-letters-test"):
        write(tmp_path / f"{name}-images-idx3-ubyte.gz", idx(levels(2, 7, 7)))
    expected = torch.from_numpy(levels(2, 7, 7).transpose(0, 2, 1).copy())
    assert torch.equal(opened(f"{tmp_path}:test").images[:, 0], expected)
    assert "EMNIST stores images transposed" in caplog.text


def test_the_command_line_edits_them(mnist):
    found = read_images(str(mnist / TEST), 2, (1, 7, 7))
    assert torch.equal(found, opened(f"{mnist}:test").images[:2] / 255)


def test_a_colon_in_a_name_is_no_split(tmp_path):
    write(tmp_path / "a:test", idx(levels(2, 7, 7)))
    assert len(opened(tmp_path / "a:test")) == 2


SOUND = idx(levels(5, 7, 7))
FAULTS = {
    "cut": (SOUND[:-1], "declares 5 x 7 x 7 bytes, and holds only 244 bytes: download it again"),
    "longer": (SOUND + b"x", "declares 5 x 7 x 7 bytes, and holds more"),
    "header": (SOUND[:9], "ends in its header"),
    "empty": (b"", "begins with nothing"),
    "magic": (b"\1" + SOUND[1:], "is no IDX file: it begins with 01000803"),
    "type": (idx(levels(5, 7, 7), 0x0D), "values of type float32, .* must be uint8"),
    "odd type": (idx(levels(5, 7, 7), 0x7), "values of type 0x7"),
    "labels": (idx(levels(9)), "has 1 dimension, and images have 3"),
    "none": (idx(levels(0, 7, 7)), "holds no images"),
    "huge": (struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 2**31), "declares .* bytes, and at most"),
    "text": (b"hello", "is no IDX file: it begins with 68656c6c"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named(case, suffix, tmp_path):
    content, text = FAULTS[case]
    write(tmp_path / f"{TRAIN}{suffix}", content)
    for source in (tmp_path, tmp_path / f"{TRAIN}{suffix}"):
        with pytest.raises(DataError, match=rf"{TRAIN}.* {text}") as raised:
            opened(source)
        assert "\n" not in str(raised.value)


def test_broken_gzip_is_named(mnist):
    path = mnist / f"{TRAIN}.gz"
    content = path.read_bytes()
    for broken in (content[:-9], content[:60] + b"xxxx" + content[64:], content[:5]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"cannot read .*{TRAIN}\.gz: .*; is the download"):
            opened(mnist)


def test_labels_of_another_number_are_refused(mnist):
    write(mnist / "train-labels-idx1-ubyte.gz", idx(levels(4)))
    with pytest.raises(DataError, match=r"train-labels.*holds 4 labels, and train.* 5 images"):
        opened(mnist)


def test_splits_that_are_not_there(mnist):
    with pytest.raises(DataError, match="has no split 'valid'; its splits are train, test"):
        opened(f"{mnist}:valid")
    with pytest.raises(DataError, match="is one file, and has no split 'test'"):
        opened(f"{mnist / TEST}:test")
    (mnist / TEST).unlink()
    with pytest.raises(DataError, match=rf"no file of the split 'test'; it holds {TRAIN}\.gz"):
        opened(f"{mnist}:test")
    write(mnist / f"emnist-digits-{TRAIN}", SOUND)
    with pytest.raises(DataError, match="several data sets"):
        opened(mnist)


def test_an_unpacked_file_beside_its_archive_is_one_data_set(mnist):
    write(mnist / TRAIN, idx(levels(4, 7, 7)))
    (mnist / "train-labels-idx1-ubyte.gz").unlink()
    assert len(opened(mnist)) == 4
