"""Data sets that are read once, before the work: in memory where they fit, damaged ones found."""

import logging
import zipfile

import pytest
import torch
from PIL import Image

from ncsn_fast.data import kept
from ncsn_fast.data.datasets import DataError, MemoryImages, open_images, stack
from ncsn_fast.data.held_out import Subset
from ncsn_fast.data.kept import keep

SHAPE = (1, 2, 2)
WHOLE = torch.arange(11 * 4, dtype=torch.uint8).reshape(11, *SHAPE)
LABELS = torch.arange(11) % 3


class Counting:
    """Data set that counts how often each image is decoded; some of them cannot be."""

    def __init__(self, damaged: tuple[int, ...] = ()) -> None:
        self.decoded, self.damaged = [0] * 11, damaged
        self.labels, self.classes = LABELS, ("a", "b", "c")

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> torch.Tensor:
        self.decoded[index] += 1
        if index in self.damaged:
            raise DataError(f"cannot decode {index}.png: it is short. Remove or replace it.")
        return WHOLE[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_read_once_into_memory(monkeypatch, workers):
    monkeypatch.setattr(kept, "AT_ONCE", 4)
    images = keep(source := Counting(), SHAPE, workers=workers)
    assert isinstance(images, MemoryImages)
    assert torch.equal(images.images, WHOLE)
    assert torch.equal(images.labels, LABELS)
    assert images.classes == source.classes
    assert source.decoded == [workers == 0] * 11
    assert keep(images, SHAPE) is images


def test_what_does_not_fit_is_decoded_again(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(kept, "KEPT_BYTES", 43)
    source = Counting()
    assert keep(source, SHAPE) is source
    assert "decoded again in each epoch: they have 44 B, and 43 B are kept" in caplog.text
    assert sum(source.decoded) == 0
    assert keep(source, SHAPE, skip_damaged=True) is source  # none is
    assert source.decoded == [1] * 11
    monkeypatch.setattr(kept, "KEPT_BYTES", 44)
    assert isinstance(keep(source, SHAPE), MemoryImages)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_damaged_images_are_counted_and_the_first_named(monkeypatch, workers):
    monkeypatch.setattr(kept, "AT_ONCE", 2)
    with pytest.raises(DataError) as raised:
        keep(Counting((1, 4, 5, 9)), SHAPE, workers=workers)
    assert str(raised.value) == (
        "4 of 11 images cannot be read: cannot decode 1.png: it is short; cannot decode 4.png: it "
        "is short; cannot decode 5.png: it is short; and 1 more. Remove or replace them, or leave "
        "them out with --skip-damaged."
    )


@pytest.mark.parametrize("fits", [True, False])
def test_damaged_images_are_left_out_and_counted(monkeypatch, caplog, fits):
    monkeypatch.setattr(kept, "AT_ONCE", 3)
    monkeypatch.setattr(kept, "KEPT_BYTES", 44 if fits else 43)
    images = keep(Counting((0, 6, 7, 8)), SHAPE, skip_damaged=True)
    assert isinstance(images, MemoryImages if fits else Subset)
    good = [1, 2, 3, 4, 5, 9, 10]
    assert torch.equal(stack(images), WHOLE[good])
    assert torch.equal(images.labels, LABELS[good])
    assert images.classes == ("a", "b", "c")
    assert "4 of 11 images are damaged and left out: cannot decode 0.png: it is" in caplog.text


def test_where_nothing_can_be_read_nothing_is_left_out():
    with pytest.raises(
        DataError, match=r"11 of 11 images cannot be read.*Remove or replace them.$"
    ):
        keep(Counting(tuple(range(11))), SHAPE, skip_damaged=True)


def test_a_choice_of_images_names_all_damaged_ones():
    with pytest.raises(DataError, match=r"^2 of 4 images cannot be read: cannot decode 3.png: it"):
        stack(Counting((3, 5, 9)), [2, 3, 4, 5])


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_files_of_every_format_that_can_be_damaged_one_by_one(tmp_path, kind):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abcd":
        Image.new("L", (9, 7), 30).save(folder / f"{name}.png")
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    (folder / "d.png").write_text("no picture")
    source = folder
    if kind == "zip":
        source = tmp_path / "photos.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, path.name)
    images = open_images(source, size=4, channels=1)
    with pytest.raises(DataError, match=r"^2 of 4 images cannot be read: .*b.png.*; .*d.png"):
        keep(images, (1, 4, 4))
    assert len(keep(images, (1, 4, 4), skip_damaged=True)) == 2
