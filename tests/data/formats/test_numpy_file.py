"""Arrays of images in .npy and .npz files: types, ranges, layouts, labels, faults."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import DataError, MemoryImages, Transform
from ncsn_fast.data.formats import arrays, numpy_file


def levels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def opened(source, **options) -> datasets.Images:
    return datasets.open_images(source, **{"size": 7, "channels": 3, **options})


def saved(folder: Path, array: np.ndarray, suffix: str = ".npy") -> Path:
    path = folder / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, images=array)
    return path


LAYOUTS = {
    "NHWC": lambda x: x.transpose(0, 2, 3, 1),
    "NCHW": lambda x: x,
    "fortran": lambda x: np.asfortranarray(x),
}
RANGES = {
    "uint8": lambda x: x,
    "float32 in [0, 1]": lambda x: (x / 255).astype(np.float32),
    "float64 in [0, 1]": lambda x: x / 255,
    ">f4 in [0, 1]": lambda x: (x / 255).astype(">f4"),
    "float32 in [-1, 1]": lambda x: (x / 127.5 - 1).astype(np.float32),
    "float16 in [-1, 1]": lambda x: (x / 127.5 - 1).astype(np.float16),
}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_range(layout, kind, suffix, tmp_path, caplog):
    caplog.set_level("INFO")
    expected = levels(5, 3, 7, 7)
    images = opened(saved(tmp_path, LAYOUTS[layout](RANGES[kind](expected)), suffix))
    assert isinstance(images, MemoryImages)
    if "16" in kind:  # which has 11 bits
        assert (images.images.int() - torch.from_numpy(expected).int()).abs().max() <= 1
    else:
        assert torch.equal(images.images, torch.from_numpy(expected))
    said = layout if layout != "fortran" else "NCHW"
    assert f": 5 images as {said} (5, " in caplog.text
    assert kind in caplog.text


def test_grey_and_other_sizes(tmp_path):
    grey = levels(4, 7, 9)
    path = saved(tmp_path, grey)
    assert torch.equal(opened(path)[2], Transform(7, 3)(Image.fromarray(grey[2])))
    assert torch.equal(opened(path, size=5)[-1], Transform(5, 3)(Image.fromarray(grey[3])))
    colour = levels(4, 9, 9, 3)
    options = {"size": 6, "channels": 1, "centre_crop": 8}
    expected = Transform(**options)(Image.fromarray(colour[1]))
    assert torch.equal(opened(saved(tmp_path, colour), **options)[1], expected)
    column = saved(tmp_path, levels(4, 7, 7, 1), ".npz")
    assert torch.equal(opened(column, channels=1)[0][0], torch.from_numpy(levels(4, 7, 7)[0]))


def test_large_files_stay_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "KEPT_BYTES", 100)
    path = saved(tmp_path, levels(4, 3, 7, 7))
    images = opened(path)
    assert isinstance(images, arrays.ArrayImages)
    assert isinstance(images.array, np.memmap)
    expected = torch.from_numpy(levels(4, 3, 7, 7))
    for found in (images, pickle.loads(pickle.dumps(images))):
        assert torch.equal(datasets.stack(found), expected)
        assert torch.equal(found[-1], expected[3])
    assert len(pickle.dumps(images)) < 2000
    with pytest.raises(IndexError):
        images[4]


def test_names_of_images_and_labels(tmp_path):
    path = tmp_path / "a.npz"
    x, y = levels(4, 7, 7), np.array([2, 0, 1, 1])
    for names in (("images", "labels"), ("x", "y"), ("arr_0", "arr_1"), ("x_train", "y_train"),
                  ("train_images", "train_labels")):  # fmt: skip
        np.savez(path, **dict(zip(names, (x, y), strict=True)))
        images = opened(path, channels=1)
        assert torch.equal(images.images[:, 0], torch.from_numpy(x))
        assert images.labels.tolist() == [2, 0, 1, 1]
        assert images.classes == ("0", "1", "2")
        assert numpy_file.holds_images(path)
    np.savez_compressed(path, faces=x, ages=y)
    assert opened(path, channels=1).labels is None
    np.savez(path, images=x, labels=y[:, None].astype(np.uint8))
    assert opened(path).labels.tolist() == [2, 0, 1, 1]


def test_splits(tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez(
        path, x_train=levels(4, 7, 7), y_train=np.arange(4), x_test=levels(2, 7, 7, seed=1),
        y_test=np.arange(2),
    )  # fmt: skip
    assert len(opened(path)) == 4
    held_out = opened(f"{path}:test", channels=1)
    assert torch.equal(held_out.images[:, 0], torch.from_numpy(levels(2, 7, 7, seed=1)))
    assert held_out.labels.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"no array of images of the split 'valid'; it holds x_tr"):
        opened(f"{path}:valid")
    with pytest.raises(DataError, match="has no split 'test'"):
        opened(f"{saved(tmp_path, levels(2, 7, 7))}:test")


def with_nan(x: np.ndarray) -> np.ndarray:
    x = x / 255
    x[1, 2] = np.nan
    return x


FAULTS = {
    "objects": (np.array([[[None] * 4] * 4]), "holds Python objects, .* save a plain array"),
    "nan": (with_nan(levels(3, 7, 7)), "not finite, in images from 0 on"),
    "beyond": (levels(3, 7, 7) / 1.0, r"\[0, 1\] or \[-1, 1\]; got 0 to 249: divide by 255"),
    "int64": (levels(3, 7, 7).astype(np.int64), r"got int64: convert it with \.astype"),
    "uint16": (levels(3, 7, 7).astype(np.uint16), "must be uint8, .*; got uint16"),
    "bool": (levels(3, 7, 7) > 9, "got bool"),
    "longdouble": (levels(3, 7, 7).astype(np.longdouble), "got (float128|longdouble)"),
    "text": (np.array([[["a" * 9] * 9] * 9]), "must be uint8"),
    "one image": (levels(7, 7, 3), r"must be \(N, H, W\), .*; got \(7, 7, 3\): reshape it"),
    "transparent": (levels(3, 7, 7, 4), r"with 1 or 3 channels; got \(3, 7, 7, 4\)"),
    "flat": (levels(3, 49), r"got \(3, 49\)|no array of images|must be \(N"),
    "ambiguous": (levels(3, 3, 9, 3), r"may be \(N, H, W, C\) or \(N, C, H, W\): make its images"),
    "none": (levels(0, 7, 7), r"holds no images: its shape is \(0, 7, 7\)|cannot read"),
}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named(case, suffix, tmp_path):
    array, text = FAULTS[case]
    path = saved(tmp_path, array, suffix)
    with pytest.raises(DataError, match=text) as raised:
        opened(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_labels_that_do_not_fit(tmp_path):
    path = tmp_path / "a.npz"
    for labels, text in (
        (np.arange(3), ": 4 images, but 3 labels"),
        (np.ones(4), r"labels must be integers \(N,\); got float64 \(4,\)"),
        (np.int64(3), r"labels must be integers \(N,\); got int64 \(\)"),
        (np.array([None] * 4), "labels holds Python objects"),
        (np.ones((4, 2), int), r"got int64 \(4, 2\)"),
        (np.array([0, 1, -1, 2]), "got -1 to 2"),
    ):
        np.savez(path, images=levels(4, 7, 7), labels=labels)
        with pytest.raises(DataError, match=rf"a\.npz.*{text}"):
            opened(path)


def test_several_arrays_that_may_be_images(tmp_path):
    np.savez(tmp_path / "a.npz", left=levels(4, 7, 7), right=levels(4, 7, 7))
    with pytest.raises(DataError, match=r"several arrays .*left uint8 \(4, 7, 7\), right.*name"):
        opened(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(DataError, match=r"holds no array of images; it holds mu float64 \(4,\)"):
        opened(tmp_path / "a.npz")
    assert not numpy_file.holds_images(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_files(suffix, tmp_path):
    path = saved(tmp_path, levels(3, 7, 7), suffix)
    content = path.read_bytes()
    for broken in (content[:-20], content[:30], b"", b"hello", content.replace(b"u1", b"u9")):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"a\{suffix}.*(save it again|it holds)"):
            opened(path)
        assert not numpy_file.holds_images(path)
    if suffix == ".npy":
        path.write_bytes(content + b"x")
        with pytest.raises(DataError, match="holds 1 bytes more than its array"):
            opened(path)


def test_declared_sizes_are_bounded(tmp_path, monkeypatch):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (2**30, 2**10, 2**10)}
    )
    (tmp_path / "a.npy").write_bytes(header.getvalue())
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    for suffix in ("npy", "npz"):
        with pytest.raises(DataError, match=r"declares 1,125,899,906,842,624 bytes, and at most"):
            opened(tmp_path / f"a.{suffix}")
