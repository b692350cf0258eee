"""Labels of folders, zip files and Hugging Face data sets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import DataError

NAMES = ("b cat/1.png", "a dog/2.png", "b cat/deep/0.png", "c/3.png")


def opened(source) -> datasets.Images:
    return datasets.open_images(source, size=4, channels=1)


def picture(level: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4), level, np.uint8))


def fill(folder: Path, names=NAMES) -> Path:
    """A folder whose images are as bright as their place in `names`."""
    for level, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(level).save(folder / name)
    return folder


def archive(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def by_level(images: datasets.Images) -> dict[int, str | None]:
    """The class of each image, by its brightness."""
    levels = [int(images[i][0, 0, 0]) for i in range(len(images))]
    if images.labels is None:
        return dict.fromkeys(levels)
    assert images.labels.dtype == torch.int64
    found = [images.classes[i] for i in images.labels.tolist()]
    return dict(zip(levels, found, strict=True))


@pytest.mark.parametrize("below", ["", "set/images"])
def test_folders_are_classes_in_the_order_of_their_names(below, tmp_path, caplog):
    caplog.set_level("INFO")
    fill(tmp_path / "images" / below)
    for source in (tmp_path / "images", archive(tmp_path / "images")):
        images = opened(source)
        assert images.classes == ("a dog", "b cat", "c")
        assert by_level(images) == {0: "b cat", 1: "a dog", 2: "b cat", 3: "c"}
        assert f"{source}: labels of 3 classes, from the names of its folders" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        ("0.png", "a/1.png", "b/2.png"),  # one lies outside
        ("a/0.png", "a/1.png"),  # one folder
        ("a/0.png", "a/b/1.png", "a/c/2.png"),
        ("train/0.png", "Test/1.png"),  # splits
        ("0.png",),
    ],
)
def test_folders_that_are_no_classes(names, tmp_path):
    fill(tmp_path / "images", names)
    for source in (tmp_path / "images", archive(tmp_path / "images")):
        images = opened(source)
        assert images.labels is None
        assert images.classes == ()


def described(folder: Path, content) -> tuple[Path, Path]:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "dataset.json").write_text(text)
    return folder, archive(folder)


def test_a_dataset_json_decides(tmp_path):
    folder = fill(tmp_path / "images")
    rows = [["c\\3.png", 0], *([name, level + 1] for level, name in enumerate(NAMES[:3]))]
    for source in described(folder, {"labels": [*rows, ["another.png", 9]]}):
        images = opened(source)
        assert by_level(images) == {0: "1", 1: "2", 2: "3", 3: "0"}
        assert images.classes == ("0", "1", "2", "3")
    for nothing in ({"labels": None}, {}):
        for source in described(folder, nothing):
            assert opened(source).labels is None
    vectors = [[name, [0.5, 1.0]] for name in NAMES]
    for source in described(folder, {"labels": vectors}):
        assert opened(source).labels is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"labels": [[NAMES[0], 1]]}, "no label of 3 of the 4 images, such as .*; complete or"),
        ({"labels": [[name, -1] for name in NAMES]}, "class numbers from 0 to .*; got -1 to -1"),
        ({"labels": [[name, 2**40] for name in NAMES]}, "got 1099511627776 to 1099511627776"),
        ({"labels": [[name, "cat"] for name in NAMES]}, "the label 'cat', and labels must be int"),
        ({"labels": [[name, True] for name in NAMES]}, "the label True"),
        ({"labels": {"a": 1}}, r'must hold {"labels": \[\[name, class\], ...\]}'),
        ({"labels": 3}, "must hold"),
        ({"labels": [[["x"], 3]]}, "no label of 4 of the 4"),
        ("[1]", "expected a JSON object; got list"),
        ("{", "mend or remove it"),
        ("[" * 10**5, "nested too deeply"),
    ],
)
def test_a_dataset_json_that_fits_nothing(content, text, tmp_path):
    for source in described(fill(tmp_path / "images"), content):
        with pytest.raises(DataError, match=rf"dataset\.json.*{text}") as raised:
            opened(source)
        assert "\n" not in str(raised.value)


def test_a_dataset_json_is_bounded(tmp_path, monkeypatch):
    sources = described(fill(tmp_path / "images"), " " * 2000 + "{}")
    monkeypatch.setenv("NCSN_FAST_MAX_LABELS_BYTES", "1999")
    for source in sources:
        with pytest.raises(DataError, match=r"dataset\.json declares 2,002 bytes"):
            opened(source)


def test_class_column_of_hugging_face(tmp_path, monkeypatch):
    import datasets as library

    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    fill(tmp_path / "hub" / "train", ("cat/0.png", "ant/1.png", "cat/2.png"))
    images = opened(f"hf:{tmp_path / 'hub'}")
    assert images.classes == ("ant", "cat")
    assert by_level(images) == {0: "cat", 1: "ant", 2: "cat"}


def test_the_digits_have_labels():
    train, held_out = opened("digits"), opened("digits:held-out")
    assert (len(train.labels), len(held_out.labels)) == (1437, 360)
    assert train.classes == tuple("0123456789")
    with pytest.raises(DataError, match="no split 'test'; digits:held-out"):
        opened("digits:test")


def test_paths_without_splits(tmp_path):
    fill(tmp_path / "images")
    for source in (tmp_path / "images", archive(tmp_path / "images")):
        with pytest.raises(DataError, match="has no split 'test': leave :test out"):
            opened(f"{source}:test")
