"""Images from every source, the published crops and resizes, and the order of batches."""

import itertools
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import DataError, Transform
from ncsn_fast.data.loader import batch_indices, batches


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(seed)
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six PNGs in three depths, and files that are no images."""
    root = tmp_path / "images"
    for i, place in enumerate(("", "b", "b/c", "b/c", "", "a")):
        (root / place).mkdir(parents=True, exist_ok=True)
        picture(12, 8, seed=i).save(root / place / f"{i}.{'PNG' if i % 2 else 'png'}")
    (root / "notes.txt").write_text("no image")
    (root / "b" / "fake.png").mkdir()
    return root


@pytest.fixture
def archive(folder: Path) -> Path:
    path = folder.parent / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        for image in sorted(p for p in folder.rglob("*") if p.is_file()):
            file.write(image, image.relative_to(folder))
        file.writestr("__MACOSX/._0.png", b"resource fork")
    return path


def opened(source, **options):
    return datasets.open_images(source, **{"size": 8, "channels": 3, **options})


@pytest.mark.parametrize("size", [(20, 20), (30, 20), (20, 31)])
def test_transform_crops_the_centre(size):
    image = picture(*size)
    left, top = round((size[0] - 20) / 2), round((size[1] - 20) / 2)
    assert torch.equal(Transform(20, 3)(image), pixels(image)[:, top : top + 20, left : left + 20])


def test_transform_as_celeba_is_published():
    image = picture(178, 218)
    cropped = image.crop((19, 39, 159, 179))  # the centre 140 x 140
    expected = pixels(cropped.resize((64, 64), Image.Resampling.BILINEAR))
    assert torch.equal(Transform(64, 3, centre_crop=140)(image), expected)


def test_transform_resizes_the_shorter_side():
    image = picture(50, 33)
    resized = image.resize((24, 16), Image.Resampling.BILINEAR)  # 16 * 50 / 33 = 24.2
    assert torch.equal(Transform(16, 3)(image), pixels(resized)[:, :, 4:20])


def test_transform_enlarges_and_survives_odd_pictures():
    assert Transform(16, 3)(picture(3, 5)).shape == (3, 16, 16)
    assert Transform(16, 1, centre_crop=140)(picture(40, 30)).shape == (1, 16, 16)
    assert Transform(4, 3)(picture(4, 4, mode="L")).unique().numel() > 8
    assert Transform(4, 3)(picture(4, 4).convert("RGBA")).shape == (3, 4, 4)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = datasets.read_image(tmp_path / "deep.png", Transform(8, 1))[0]
    assert torch.equal(grey, torch.from_numpy((deep >> 8).astype(np.uint8)))


def test_folder_in_order_of_names(folder):
    images = opened(folder)
    assert len(images) == 6
    for i, seed in enumerate((0, 4, 5, 1, 2, 3)):
        assert torch.equal(images[i], pixels(picture(12, 8, seed=seed))[:, :, 2:10])
    assert opened(folder, channels=1)[0].shape == (1, 8, 8)


def test_zip_equals_folder(folder, archive):
    assert torch.equal(datasets.stack(opened(archive)), datasets.stack(opened(folder)))
    assert torch.equal(
        datasets.stack(opened(archive), [4, 1]), datasets.stack(opened(folder))[[4, 1]]
    )


def test_zip_can_be_sent_to_a_process(archive):
    images = opened(archive)
    first = images[0]
    assert torch.equal(pickle.loads(pickle.dumps(images))[0], first)


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_workers_change_nothing(kind, request):
    source = request.getfixturevalue(kind)
    expected = list(itertools.islice(batches(opened(source), 2, seed=3), 7))
    actual = list(itertools.islice(batches(opened(source), 2, seed=3, workers=2), 7))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert expected[0].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_corrupt_image_is_named(folder, kind, workers):
    bad = folder / "b" / "c" / "2.png"
    content = bad.read_bytes()
    bad.write_bytes({"truncated": content[:80], "text": b"hello", "empty": b""}[kind])
    with pytest.raises(DataError, match=r"b/c/2\.png.*Remove or replace it") as raised:
        next(batches(opened(folder), 6, seed=0, workers=workers))
    assert "\n" not in str(raised.value)


def test_corrupt_archive_is_named(archive):
    content = bytearray(archive.read_bytes())
    content[100:140] = b"x" * 40
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"images\.zip!0\.png"):
        datasets.stack(opened(archive))
    archive.write_bytes(content[:200])
    with pytest.raises(DataError, match=r"cannot read .*images\.zip as a zip archive"):
        opened(archive)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("", "no data given; pass --data"),
        ("nowhere", "nowhere does not exist; data is digits, a folder"),
        ("plain.txt", r"plain\.txt begins with nothing, which is no .*; data is one of: .*zip"),
        ("bare", "bare holds no images"),
        ("bare.zip", r"bare\.zip holds no images"),
        ("digits", "the digits are grey"),
        ("hf:./bare", "cannot load hf:./bare"),
    ],
)
def test_sources_that_are_no_images(tmp_path, monkeypatch, source, text):
    monkeypatch.chdir(tmp_path)
    Path("plain.txt").touch()
    Path("bare").mkdir()
    zipfile.ZipFile("bare.zip", "w").close()
    with pytest.raises(DataError, match=text):
        opened(source)


def test_hugging_face_data_set(folder, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = tmp_path / "hub"
    (source / "train").mkdir(parents=True)
    for i in range(3):
        picture(12, 8, seed=i).save(source / "train" / f"{i}.png")
    images = opened(f"hf:{source}")
    assert len(images) == 3
    assert torch.equal(images[2], pixels(picture(12, 8, seed=2))[:, :, 2:10])
    # Turned and laid on a background as files are, and bounded before they are decoded.
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture(12, 8).convert("RGBA")
    turned.putalpha(picture(12, 8, seed=1, mode="L"))
    for i in range(3):
        turned.save(source / "train" / f"{i}.png", exif=exif)
    again, files = opened(f"hf:{source}"), opened(source / "train")
    assert all(torch.equal(again[i], files[i]) for i in range(3))
    monkeypatch.setenv("NCSN_FAST_MAX_PIXELS", "95")
    with pytest.raises(DataError, match=r"hf:.*\[1\] .* declares 96 pixels"):
        again[1]
    with pytest.raises(DataError, match="split nope"):
        opened(f"hf:{source}:nope")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "train.csv").write_text("word,length\nfjord,5\n")
    with pytest.raises(DataError, match="no image column; its columns are word, length"):
        opened(f"hf:{tmp_path / 'words'}")


def test_digits_are_split_by_class():
    train, held_out = (datasets.digits(split, 8) for split in ("train", "held-out"))
    assert (len(train[0]), len(held_out[0])) == (1437, 360)
    share = [torch.bincount(labels) / len(labels) for _, labels in (train, held_out)]
    torch.testing.assert_close(share[0], share[1], rtol=0, atol=3e-3)
    seen = {image.numpy().tobytes() for image in train[0]}
    assert sum(image.numpy().tobytes() in seen for image in held_out[0]) == 0
    assert datasets.digits("train", 16)[0].shape == (1437, 1, 16, 16)
    assert (train[0].min(), train[0].max()) == (0, 255)


def test_every_epoch_is_a_permutation():
    stream = batch_indices(12, 4, seed=1)
    epochs = [list(itertools.chain(*itertools.islice(stream, 3))) for _ in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert next(batch_indices(12, 12, seed=2)) != next(batch_indices(12, 12, seed=1))


@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_order_depends_on_seed_and_step_alone(start):
    whole = list(itertools.islice(batch_indices(11, 4, seed=5), 10))
    resumed = list(itertools.islice(batch_indices(11, 4, seed=5, start_step=start), 10 - start))
    assert resumed == whole[start:]


def test_fewer_images_than_a_batch():
    first, second = itertools.islice(batch_indices(3, 8, seed=0), 2)
    assert sorted(first) == sorted(second) == [0, 1, 2]
