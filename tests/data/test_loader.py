"""Batches: decoded once where they fit, with labels, and the labels that are dropped."""

import itertools
import logging

import pytest
import torch

from ncsn_fast.data import kept
from ncsn_fast.data.datasets import DataError, MemoryImages
from ncsn_fast.data.kept import KeptImages, keep
from ncsn_fast.data.loader import batches, drop_labels, labelled_batches

SHAPE = (1, 2, 2)
WHOLE = torch.arange(11 * 4, dtype=torch.uint8).reshape(11, *SHAPE)
LABELS = torch.arange(11) % 3


class Counting:
    """Data set that counts how often each image is decoded."""

    def __init__(self, n: int = 11, labels: torch.Tensor | None = None) -> None:
        self.decoded = [0] * n
        self.labels, self.classes = labels, ("a", "b", "c")

    def __len__(self) -> int:
        return len(self.decoded)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.decoded[index] += 1
        if index == 99:
            raise DataError("image 99 is damaged")
        return WHOLE[index % 11]


@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("batch_size", [3, 11, 20])
def test_each_image_is_decoded_once(start, batch_size):
    source = Counting()
    images = keep(source, SHAPE)
    images[4]
    expected = batches(MemoryImages(WHOLE), batch_size, seed=3, start_step=start)
    found = batches(images, batch_size, seed=3, start_step=start)
    for a, b in itertools.islice(zip(expected, found, strict=True), 40):
        assert torch.equal(a, b)
    assert source.decoded == [1] * 11
    assert torch.equal(images.images, WHOLE)


def test_a_share_of_each_batch():
    images = keep(Counting(), SHAPE)
    expected = batches(MemoryImages(WHOLE), 4, seed=3)
    found = batches(images, 4, seed=3, share=slice(1, 3))
    for a, b in itertools.islice(zip(expected, found, strict=True), 40):
        assert torch.equal(a[1:3], b)
    assert images.source.decoded == [1] * 11


def test_workers_change_nothing():
    images = keep(Counting(), SHAPE)
    expected = batches(MemoryImages(WHOLE), 3, seed=3, start_step=2)
    found = batches(images, 3, seed=3, start_step=2, workers=2)
    for a, b in itertools.islice(zip(expected, found, strict=True), 8):
        assert torch.equal(a, b)
    assert bool(images.known.sum() >= 9)


def test_what_does_not_fit_is_decoded_again(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(kept, "KEPT_BYTES", 43)
    source = Counting()
    assert keep(source, SHAPE) is source
    assert "decoded again in each epoch: they have 44 B, and 43 B are kept" in caplog.text
    list(itertools.islice(batches(source, 11, seed=0), 3))
    assert sum(source.decoded) == 33
    monkeypatch.setattr(kept, "KEPT_BYTES", 44)
    assert isinstance(keep(source, SHAPE), KeptImages)
    assert keep(memory := MemoryImages(WHOLE), SHAPE) is memory


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_named(workers):
    images = keep(Counting(100), SHAPE)
    with pytest.raises(DataError, match=r"^image 99 is damaged$"):
        list(itertools.islice(batches(images, 50, seed=0, workers=workers), 2))


@pytest.mark.parametrize("kind", ["memory", "kept", "streamed"])
def test_labels_are_those_of_the_images(kind):
    source = Counting(labels=LABELS)
    images = {"memory": MemoryImages(WHOLE, LABELS), "kept": keep(source, SHAPE),
              "streamed": source}[kind]  # fmt: skip
    plain = batches(MemoryImages(WHOLE), 4, seed=7, start_step=1)
    found = labelled_batches(images, 4, seed=7, start_step=1)
    for expected, (batch, labels) in itertools.islice(zip(plain, found, strict=True), 9):
        assert torch.equal(batch, expected)
        assert torch.equal(labels, LABELS[batch[:, 0, 0, 0].long() // 4])


def test_data_without_labels_is_refused():
    with pytest.raises(DataError, match="the data has no labels: sort the images into one folder"):
        labelled_batches(MemoryImages(WHOLE), 4, seed=0)


def test_labels_are_dropped_with_a_probability():
    labels, uniform = torch.tensor([2, 0, 1, 2]), torch.tensor([0.0, 0.09, 0.11, 0.99])
    assert drop_labels(labels, 3, uniform, 0.1).tolist() == [3, 3, 1, 2]
    assert torch.equal(drop_labels(labels, 3, uniform, 0.0), labels)
    assert drop_labels(labels, 3, uniform, 1.0).tolist() == [3] * 4
