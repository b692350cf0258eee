"""CIFAR-10 and CIFAR-100: folders and archives of pickles, sound, damaged and hostile."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import DataError, MemoryImages

NAMES = {"cifar-10-batches-py": ("labels", "label_names", "batches.meta"),
         "cifar-100-python": ("fine_labels", "fine_label_names", "meta")}  # fmt: skip


def levels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), np.uint8)


def batch(n: int, seed: int, labels: str = "labels", protocol: int = 2) -> bytes:
    content = {
        "batch_label": "a batch", labels: [(seed + i) % 4 for i in range(n)],
        "data": levels(n, seed), "filenames": [f"{i}.png" for i in range(n)],
    }  # fmt: skip
    if labels == "fine_labels":
        content["coarse_labels"] = [0] * n
    return pickle.dumps(content, protocol)


def fill(folder: Path, protocol: int = 2) -> Path:
    """Writes a folder of the name of one of the two data sets."""
    folder.mkdir(parents=True)
    labels, names, meta = NAMES[folder.name]
    splits = {"train": 3, "test": 2}
    if folder.name == "cifar-10-batches-py":
        splits = {**{f"data_batch_{i}": 1 for i in range(1, 6)}, "test_batch": 2}
    for seed, (name, n) in enumerate(splits.items()):
        (folder / name).write_bytes(batch(n, seed, labels, protocol))
    (folder / meta).write_bytes(pickle.dumps({names: ["ant", "bee", "cat", "dog"]}, protocol))
    return folder


def packed(folder: Path, name: str = "cifar.tar.gz") -> Path:
    path = folder.parent / name
    with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
        archive.add(folder, folder.name)
    return path


def opened(source, **options) -> MemoryImages:
    images = datasets.open_images(source, **{"size": 32, "channels": 3, **options})
    assert isinstance(images, MemoryImages)
    return images


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_folders_and_archives(name, protocol, tmp_path):
    folder = fill(tmp_path / "root" / name, protocol)
    if name == "cifar-10-batches-py":
        seeds, expected = range(5), np.concatenate([levels(1, seed) for seed in range(5)])
        labels, held_out = [seed % 4 for seed in seeds], (levels(2, 5), [1, 2])
    else:
        expected, labels, held_out = levels(3), [0, 1, 2], (levels(2, 1), [1, 2])
    for source in (folder, folder.parent, packed(folder), packed(folder, "cifar.tar")):
        images = opened(source)
        assert torch.equal(images.images, torch.from_numpy(expected.reshape(-1, 3, 32, 32)))
        assert images.labels.tolist() == labels
        assert images.classes == ("ant", "bee", "cat", "dog")
        test = opened(f"{source}:test")
        assert torch.equal(test.images.flatten(1), torch.from_numpy(held_out[0]))
        assert test.labels.tolist() == held_out[1]
        with pytest.raises(DataError, match="no split 'valid'; its splits are train, test"):
            opened(f"{source}:valid")


def test_pickles_of_python_2(tmp_path):
    """Strings of bytes, as in the published files."""
    folder = fill(tmp_path / "cifar-100-python")
    content = levels(1).tobytes()
    shape = b"K\x01M\x00\x0c\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
        b"(K\x01" + shape + b"cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\0tb\x89T" + len(content).to_bytes(4, "little") + content + b"tb"
    )
    (folder / "train").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x0bfine_labels](K\x03eu.")
    assert pickle.loads((folder / "train").read_bytes(), encoding="bytes")[b"data"].size == 3072
    assert torch.equal(opened(folder).images.flatten(1), torch.from_numpy(levels(1)))
    assert opened(folder).labels.tolist() == [3]


def test_class_names_are_not_needed(tmp_path):
    folder = fill(tmp_path / "cifar-10-batches-py")
    (folder / "batches.meta").unlink()
    for source in (folder, packed(folder)):
        assert opened(source).classes == ("0", "1", "2", "3")


def test_two_data_sets_below_one_folder(tmp_path):
    for name in NAMES:
        fill(tmp_path / name)
    with pytest.raises(DataError, match=r"holds two data sets: give .*cifar-10-batches-py and"):
        opened(tmp_path)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def written(content) -> bytes:
    return pickle.dumps(content, 4)


SOUND = pickle.loads(batch(2, 0, "fine_labels"))
FAULTS = {
    "code": (written({**SOUND, "filenames": Hostile()}), r"names posix\.mkdir.*could run code"),
    "list": (written([SOUND]), "it is a list, and no dictionary"),
    "no data": (written({"fine_labels": [1, 2]}), "has no array 'data'"),
    "object": (written({**SOUND, "data": np.array([None] * 2)}), "has no array 'data'"),
    "floats": (written({**SOUND, "data": levels(2) / 255}), r"must be uint8 \(N, 3072\)"),
    "size": (written({**SOUND, "data": levels(2)[:, 1:]}), r"must be uint8 \(N, 3072\)"),
    "count": (written({**SOUND, "fine_labels": [1]}), "has 2 images and 1 labels"),
    "names": (written({**SOUND, "fine_labels": ["a", "b"]}), "no list of integers 'fine_labels'"),
    "negative": (written({**SOUND, "fine_labels": [-1, 2]}), "has labels from -1 to 2"),
    "none": (written({"fine_labels": [], "data": levels(0)}), "holds no images"),
    "cut": (written(SOUND)[:-40], "cannot read"),
    "empty": (b"", "cannot read"),
    "text": (b"hello", "cannot read"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named(case, tmp_path, monkeypatch):
    content, text = FAULTS[case]
    monkeypatch.chdir(tmp_path)
    folder = fill(tmp_path / "cifar-100-python")
    (folder / "train").write_bytes(content)
    for source in (folder, packed(folder)):
        with pytest.raises(DataError, match=rf"{text}.*download") as raised:
            opened(source)
        assert f"{source}: train" in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "hostile").exists()


def tar(path: Path, *members: tuple[str, bytes, dict]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for attribute, value in changes.items():
                setattr(info, attribute, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_archives_that_are_refused(tmp_path):
    good = ("cifar-100-python/train", batch(2, 0, "fine_labels"), {})
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    cases = {
        "is a link or device": [("cifar-100-python/train", b"", link)],
        "lies outside of the archive": [("/train", good[1], {})],
        "train lies outside": [("x/../../train", good[1], {})],
        "holds two files train": [good, ("again/train", good[1], {})],
        "holds no batches of CIFAR-10 or CIFAR-100": [("images/a.png", b"x", {})],
        "lacks data_batch_1": [("test_batch", good[1], {})],
    }
    for text, members in cases.items():
        with pytest.raises(DataError, match=text):
            opened(tar(tmp_path / "a.tar.gz", *members))
    path = tar(tmp_path / "a.tar.gz", good, ("cifar-100-python/file.txt~", b"", {}))
    assert len(opened(path)) == 2
    content = path.read_bytes()
    for broken in (content[:-30], b"hello", b"", content[:100] + b"xxxx" + content[104:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"cannot read .*a\.tar\.gz|holds no batches"):
            opened(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz"]


def test_archives_are_bounded(tmp_path, monkeypatch):
    path = packed(fill(tmp_path / "cifar-100-python"))
    monkeypatch.setenv("NCSN_FAST_MAX_DATA_BYTES", "9500")
    with pytest.raises(DataError, match=r"declares .* bytes, and at most 9,500"):
        opened(path)


def test_a_missing_batch_is_named(tmp_path):
    folder = fill(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3: No such file or directory; download"):
        opened(folder)
    with pytest.raises(DataError, match=r"lacks data_batch_3"):
        opened(packed(folder))
    assert len(opened(f"{folder}:test")) == 2
