"""Figures of samples by a classifier, beside real images: here the digits of scikit-learn."""

import pytest
import torch

from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import MemoryImages
from ncsn_fast.evaluation.classifier_figures import RealDigits
from ncsn_fast.evaluation.features import Extractor, load_extractor


@pytest.fixture(scope="module")
def real():
    train, held_out = (datasets.digits(split, 16) for split in ("train", "held-out"))
    return RealDigits(load_extractor("digits"), MemoryImages(*train), MemoryImages(*held_out))


def test_held_out_digits_have_the_figures_that_are_so_by_definition(real):
    images, labels = datasets.digits("held-out", 16)
    found = real.figures(images.float() / 255)
    assert found.recognised == pytest.approx(0.95, abs=1 / 360)
    assert found.copies == pytest.approx(0.01, abs=1 / 360)
    assert found.frechet == pytest.approx(0, abs=1e-6)
    assert found.nearest_train == found.nearest_train_held_out > 1
    assert found.held_out_accuracy > 0.98
    share = torch.bincount(labels).double() / len(labels)
    assert found.class_share == pytest.approx(share.tolist(), abs=2 / 360)
    assert sum(found.class_share) == pytest.approx(1)


def test_training_digits_are_copies(real):
    images, _ = datasets.digits("train", 16)
    found = real.figures(images.float() / 255)
    assert found.nearest_train == pytest.approx(0, abs=1e-4)
    assert found.copies == 1
    assert found.frechet == pytest.approx(found.frechet_train, abs=1e-9)  # of the same images
    assert found.frechet > 0


def test_the_distance_of_training_digits_is_of_as_many_as_samples(real):
    images = datasets.digits("held-out", 16)[0].float() / 255
    few, many = (real.figures(images[:n]).frechet_train for n in (40, 360))
    assert few > 2 * many


def test_noise_is_far_from_digits(real):
    noise = torch.rand(50, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = real.figures(noise)
    assert found.frechet > 10 * found.frechet_train
    assert max(found.class_share) > 0.9  # a classifier may be sure of what is no digit
    assert found.nearest_train > 2 * found.nearest_train_held_out


def test_needs_ten_classes_and_labels():
    images = MemoryImages(torch.zeros(3, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="two labelled ones held out; got 3 and 3 without labels"):
        RealDigits(load_extractor("digits"), images, images)

    class Features(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4], None

    with pytest.raises(ValueError, match="such as mnist; mine has 0 classes"):
        RealDigits(Extractor(Features(), "mine", ""), images, images)
