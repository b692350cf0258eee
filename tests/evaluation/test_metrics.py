"""Figures of merit against closed forms, and on digits that are real, noise and copies."""

import numpy as np
import pytest
import torch

from ncsn_fast.data import datasets
from ncsn_fast.evaluation import metrics
from ncsn_fast.evaluation.metrics import (
    digit_figures,
    frechet_distance,
    nearest_distances,
    nearest_images,
    statistics_distance,
    statistics_of,
)


def with_moments(mean, covariance, n=50):
    """Points whose sample mean and covariance are exactly these."""
    points = np.random.default_rng(0).standard_normal((n, len(mean)))
    points -= points.mean(axis=0)
    white = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T
    return white @ np.linalg.cholesky(np.asarray(covariance)).T + mean


@pytest.mark.parametrize(
    ("mean", "covariance", "expected"),
    [
        ([0, 0, 0], np.eye(3), 0),
        ([3, 4, 0], np.eye(3), 25),
        ([0, 0, 0], np.diag([4.0, 9.0, 1.0]), 1 + 4 + 0),  # (s - 1)^2 summed
        ([1, 0, -1], 0.25 * np.eye(3), 2 + 3 * 0.25),
    ],
)
def test_frechet_distance_of_gaussians(mean, covariance, expected):
    a, b = with_moments([0, 0, 0], np.eye(3)), with_moments(mean, covariance)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_of_rotated_gaussians():
    # Two dimensions: tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB)).
    a, b = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    actual = frechet_distance(with_moments([0, 0], a), with_moments([1, 2], b))
    assert actual == pytest.approx(5 + np.trace(a) + np.trace(b) - 2 * root, abs=1e-9)


def test_frechet_distance_of_degenerate_sets():
    a = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])  # no variance in the second feature
    assert frechet_distance(a, a + np.array([0.0, 3.0])) == pytest.approx(9, abs=1e-6)
    assert frechet_distance(a[:, :1], 2 * a[:, :1]) == pytest.approx(4 + 4, abs=1e-9)
    with pytest.raises(ValueError, match="two samples on each side; got 1 and 3"):
        frechet_distance(a[:1], a)


def test_a_singular_set_is_at_no_distance_of_itself():
    """Ten points in 64 dimensions; eigenvalues of the product would be some 1e-8 off each."""
    a = 1e3 * np.random.default_rng(1).standard_normal((10, 64))
    assert 0 <= frechet_distance(a, a) < 1e-12 * np.trace(np.cov(a, rowvar=False))


def test_the_distance_of_statistics_is_that_of_their_features():
    a, b = (np.random.default_rng(i).standard_normal((20 + i, 5)) for i in range(2))
    assert statistics_distance(statistics_of(a), statistics_of(b)) == frechet_distance(a, b)
    assert (statistics_of(a).n, statistics_of(b).n) == (20, 21)


def test_nearest_distances():
    references = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]).reshape(3, 1, 1, 2)
    samples = torch.tensor([[3.0, 3.0], [-9.0, 0.0]]).reshape(2, 1, 1, 2)
    distances, indices = nearest_distances(samples, references)
    assert distances.tolist() == [1, 8]
    assert indices.tolist() == [1, 2]


def test_blocks_do_not_change_the_nearest(monkeypatch):
    train, held_out = (datasets.digits(split, 8)[0] for split in ("train", "held-out"))
    samples = held_out[:50] / 255
    distances, indices = nearest_distances(samples, train / 255)
    whole = torch.cdist(samples.flatten(1).double(), (train / 255).flatten(1).double())
    assert torch.equal(indices, whole.argmin(1))
    torch.testing.assert_close(distances, whole.amin(1))
    monkeypatch.setattr(metrics, "ROWS", 7)
    monkeypatch.setattr(metrics, "ELEMENTS", 100 * 64 + 1)  # blocks of 100 images
    assert torch.equal(nearest_distances(samples, train / 255)[1], indices)
    found, where = nearest_images(samples, datasets.MemoryImages(train))
    assert where == indices.tolist()
    assert torch.equal(found, train[indices] / 255)


def test_one_image_larger_than_a_block_is_a_block(monkeypatch):
    monkeypatch.setattr(metrics, "ELEMENTS", 1)
    images = datasets.MemoryImages(
        torch.tensor([0, 90, 200], dtype=torch.uint8).reshape(3, 1, 1, 1)
    )
    found, where = nearest_images(torch.tensor([0.3, 0.9]).reshape(2, 1, 1, 1), images)
    assert where == [1, 2]
    assert (found.flatten() * 255).tolist() == pytest.approx([90, 200])


def test_digit_figures_tell_real_from_noise_and_from_copies():
    train, held_out = (datasets.digits(split, 16)[0] / 255 for split in ("train", "held-out"))
    real = digit_figures(held_out)
    assert real.held_out_accuracy > 0.97
    assert real.frechet == pytest.approx(0, abs=1e-3)
    assert 0.94 < real.recognised < 0.97  # by definition of the threshold
    assert real.copies < 0.02
    assert real.nearest_train == pytest.approx(real.nearest_train_held_out)
    assert sum(real.class_share) == pytest.approx(1)
    assert max(real.class_share) < 0.13

    copies = digit_figures(train[:360])
    assert copies.copies == 1
    assert copies.nearest_train == pytest.approx(0, abs=1e-5)

    noise = torch.rand(360, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = digit_figures(noise)
    assert found.recognised < 0.2
    assert found.frechet > 20 * found.frechet_train
    assert found.nearest_train > 2 * found.nearest_train_held_out
