"""Batches, with labels, and the labels that are dropped."""

import itertools

import pytest
import torch

from ncsn_fast.data.datasets import DataError, MemoryImages
from ncsn_fast.data.loader import batches, drop_labels, labelled_batches

SHAPE = (1, 2, 2)
WHOLE = torch.arange(11 * 4, dtype=torch.uint8).reshape(11, *SHAPE)
LABELS = torch.arange(11) % 3


class Streamed:
    """Data set of images that are decoded when they are asked for."""

    def __init__(self, n: int = 11, labels: torch.Tensor | None = None) -> None:
        self.n = n
        self.labels, self.classes = labels, ("a", "b", "c")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 99:
            raise DataError("image 99 is damaged")
        return WHOLE[index % 11]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_share_of_each_batch(workers):
    expected = batches(MemoryImages(WHOLE), 4, seed=3, start_step=1)
    found = batches(Streamed(), 4, seed=3, start_step=1, workers=workers, share=slice(1, 3))
    for a, b in itertools.islice(zip(expected, found, strict=True), 8):
        assert torch.equal(a[1:3], b)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_named(workers):
    with pytest.raises(DataError, match=r"^image 99 is damaged$"):
        list(itertools.islice(batches(Streamed(100), 50, seed=0, workers=workers), 2))


@pytest.mark.parametrize("kind", ["memory", "streamed"])
def test_labels_are_those_of_the_images(kind):
    source = Streamed(labels=LABELS)
    images = {"memory": MemoryImages(WHOLE, LABELS), "streamed": source}[kind]
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
