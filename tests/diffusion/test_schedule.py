"""The noise ladder against the published figures and against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch

from ncsn_fast.diffusion import schedule, spacing

# dimension, sigma_1, published L, T, L for C = 0.5, best epsilon, its variance ratio
PUBLISHED = {
    "cifar10": (3 * 32**2, 50.0, 232, 5, 219, 6.18e-6, 1.055),
    "celeba": (3 * 64**2, 90.0, 500, 5, 472, 3.34e-6, 1.031),
    "church": (3 * 96**2, 140.0, 788, 4, 745, 2.31e-6, 1.022),
    "bedroom": (3 * 128**2, 190.0, 1086, 3, 1026, 1.77e-6, 1.017),
    "ffhq": (3 * 256**2, 348.0, 2311, 3, 2182, 8.93e-7, 1.009),
}
published = pytest.mark.parametrize("row", PUBLISHED.values(), ids=PUBLISHED)


def spread(n, *shape, offset=0.0, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) + offset


def farthest(images):
    """Brute force in float64."""
    flat = images.flatten(1).double() / (255 if images.dtype == torch.uint8 else 1)
    return float(max((a - b).norm() for a in flat for b in flat))


@published
def test_technique2_number_of_levels(row):
    dim, sigma_begin, _, _, n, _, _ = row
    assert schedule.n_levels(sigma_begin, 0.01, dim) == n


@published
def test_published_ladders_have_one_overlap(row):
    dim, sigma_begin, n = row[:3]
    ratio = (sigma_begin / 0.01) ** (1 / (n - 1))
    assert 0.5660 <= schedule.overlap(ratio, dim) <= 0.5671
    assert schedule.n_levels(sigma_begin, 0.01, dim, schedule.overlap(ratio, dim)) == n


def test_technique2_ratio():
    assert schedule.level_ratio(3072) == pytest.approx(1.039796, abs=5e-7)
    assert schedule.overlap(1.668101, 3072) == pytest.approx(0, abs=1e-12)  # NCSN of 2019
    assert 1 + math.log(5000) / math.log(schedule.level_ratio(3072)) == pytest.approx(
        219.2, abs=0.05
    )


@pytest.mark.parametrize("dim", [5, 64, 3072, 3 * 1024**2])
@pytest.mark.parametrize("c", [0.05, 0.5, 0.9])
def test_level_ratio_solves_its_equation(dim, c):
    ratio = schedule.level_ratio(dim, c)
    assert ratio > 1
    assert schedule.overlap(ratio, dim) == pytest.approx(c, abs=1e-9)


def test_more_overlap_or_more_dimensions_mean_more_levels():
    by_overlap = [schedule.n_levels(50, 0.01, 3072, c) for c in (0.1, 0.3, 0.5, 0.7, 0.9)]
    by_dimension = [schedule.n_levels(50, 0.01, d) for d in (5, 10, 100, 1000, 10000)]
    by_range = [schedule.n_levels(s, 0.01, 3072) for s in (0.01, 0.1, 1, 10, 100)]
    for counts in (by_overlap, by_dimension, by_range):
        assert all(a < b for a, b in itertools.pairwise(counts))
    assert by_range[0] == 1


@pytest.mark.parametrize("c", [0.0, 1.0, -0.2, 0.9999])
def test_impossible_overlaps_are_refused(c):
    with pytest.raises(ValueError, match=r"overlap C must be in \(0, 0\.99"):
        schedule.level_ratio(3072, c)


def test_data_of_very_few_dimensions_have_no_ratio():
    with pytest.raises(ValueError, match=r"no ratio reaches .* 4 dimensions; give n_sigmas"):
        schedule.level_ratio(4)


@published
def test_technique4(row):
    _, sigma_begin, n, t, _, epsilon, ratio = row
    ladder = schedule.geometric(sigma_begin, 0.01, n)
    found = schedule.epsilon_for(ladder, t)
    assert found == pytest.approx(epsilon, rel=2.5e-3)  # the table has three figures
    gamma = (sigma_begin / 0.01) ** (1 / (n - 1))
    assert schedule.variance_ratio(found, gamma, t, 0.01) == pytest.approx(ratio, abs=6e-4)
    around = found * np.linspace(0.5, 1.5, 101)
    assert min(schedule.variance_ratio(e, gamma, t, 0.01) for e in around) >= (
        schedule.variance_ratio(found, gamma, t, 0.01) * (1 - 1e-12)
    )


@pytest.mark.parametrize(("t", "epsilon"), [(3, 6.619e-6), (5, 6.184e-6), (10, 5.302e-6)])
def test_technique4_for_other_numbers_of_steps(t, epsilon):
    assert schedule.technique4(5000 ** (1 / 231), t, 0.01) == pytest.approx(epsilon, rel=1e-4)


def test_technique4_scales_with_the_smallest_sigma():
    small, large = (schedule.technique4(1.04, 5, s) for s in (0.01, 0.1))
    assert large / small == pytest.approx(100, rel=1e-6)


def test_technique4_follows_a_variance_by_the_recursion():
    """The formula is T steps of the ALD recursion on a point: v' = (1 - eta)^2 v + 2 eta."""
    ratio, eta, t = 1.3, 0.07, 4
    v = ratio**2
    for _ in range(t):
        v = (1 - eta) ** 2 * v + 2 * eta
    assert schedule.variance_ratio(eta * 0.2**2, ratio, t, 0.2) == pytest.approx(v, rel=1e-12)


def test_technique4_needs_a_step():
    with pytest.raises(ValueError, match="n_steps_each must be at least 1; got 0"):
        schedule.technique4(1.04, 0, 0.01)


def test_technique4_of_one_level_is_undefined():
    with pytest.raises(ValueError, match="neighbours of ratio 1; give epsilon yourself"):
        schedule.epsilon_for([0.5], 5)


@pytest.mark.parametrize("ratio", [1.02, 1.7, 20.0])
def test_technique4_with_one_step(ratio):
    """T = 1: (1 - eta)^2 gamma^2 + 2 eta is least at eta = 1 - 1 / gamma^2."""
    assert schedule.technique4(ratio, 1, 0.1) / 0.01 == pytest.approx(1 - ratio**-2, rel=1e-4)


def test_geometric_ladder():
    ladder = schedule.geometric(50.0, 0.01, 232)
    assert ladder.dtype == torch.float32
    assert len(ladder) == 232
    assert ladder[[0, -1]].tolist() == pytest.approx([50.0, 0.01], rel=1e-6)
    np.testing.assert_allclose(ladder[1:] / ladder[:-1], 5000 ** (-1 / 231), rtol=1e-5)
    assert schedule.geometric(3.0, 0.1, 1).tolist() == [3.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.0, 0.1, 0), "n_sigmas must be at least 1; got 0"),
        ((0.1, 1.0, 3), "expected 0 < sigma_end <= sigma_begin; got sigma_begin=0.1, sigma_end=1"),
        ((1.0, 0.0, 3), "sigma_end=0.0"),
        ((math.inf, 1.0, 3), "sigma_begin=inf"),
        ((math.nan, 1.0, 3), "sigma_begin=nan"),
    ],
)
def test_bad_geometric_ladders_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        schedule.geometric(*arguments)


@pytest.mark.parametrize(
    ("ladder", "words"),
    [
        ([], r"non-empty vector; got shape \(0,\)"),
        ([[2.0, 1.0]], r"non-empty vector; got shape \(1, 2\)"),
        ([2.0, 0.0], "positive and finite"),
        ([2.0, math.nan], "positive and finite"),
        ([math.inf, 1.0], "positive and finite"),
        ([2.0, 1.0, 1.0], r"descending; got sigmas\[1\]=1 <= sigmas\[2\]=1"),
        ([3.0, 0.2, 0.5], r"descending; got sigmas\[1\]=0.2 <= sigmas\[2\]=0.5"),
    ],
)
def test_bad_ladders_are_refused(ladder, words):
    with pytest.raises(ValueError, match=words):
        spacing.check_ladder(np.array(ladder))


def test_check_ladder_keeps_the_values():
    ladder = spacing.check_ladder(torch.tensor([3.0, 0.5]))
    assert ladder.dtype == np.float64
    assert ladder.tolist() == [3.0, 0.5]


def test_karras_ladders():
    """The published example, and the figures of 18 levels from 50 to .01."""
    np.testing.assert_allclose(
        spacing.karras(80, 0.002, 5), [80, 17.527832, 2.515219, 0.16975276, 0.002], rtol=5e-7
    )
    ladder = spacing.karras(50, 0.01, 18)
    np.testing.assert_allclose(ladder[:3], [50, 37.19039, 27.30334], rtol=5e-7)
    np.testing.assert_allclose(ladder[-3:], [0.05615642, 0.02498809, 0.01], rtol=5e-7)
    assert (ladder[0], ladder[-1], ladder.dtype) == (50, 0.01, np.float64)


def test_polynomial_ladders():
    np.testing.assert_allclose(spacing.polynomial(8, 0.5, 5, 1.0), [8, 4, 2, 1, 0.5], rtol=1e-14)
    np.testing.assert_allclose(spacing.polynomial(16, 1, 3, 2.0), [16, 2, 1], rtol=1e-14)


@pytest.mark.parametrize("kind", ["ladder", "geometric", "karras", "polynomial"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 231, 232])
def test_spaced_ladders_keep_their_ends(kind, n):
    own = schedule.geometric(50.0, 0.01, 232)
    ladder = spacing.spaced(own, n, kind)
    assert len(spacing.check_ladder(ladder)) == n
    assert ladder[0] == own[0].double()
    assert n == 1 or ladder[-1] == own[-1].double()
    if kind == "ladder":
        assert np.isin(ladder, own.double().numpy()).all()
        places = np.searchsorted(-own.double().numpy(), -ladder)
        assert n < 3 or np.diff(places).max() - np.diff(places).min() <= 1
    np.testing.assert_array_equal(spacing.spaced(own, n, kind, None), ladder)


def test_spaced_ladders_take_their_rho():
    own = [50.0, 1.0, 0.01]
    for name, function in (("karras", spacing.karras), ("polynomial", spacing.polynomial)):
        np.testing.assert_array_equal(spacing.spaced(own, 9, name, 3.0), function(50, 0.01, 9, 3.0))
    np.testing.assert_array_equal(
        spacing.spaced(own, 9, "karras"), spacing.karras(50, 0.01, 9, 7.0)
    )
    np.testing.assert_allclose(
        spacing.karras(50, 0.01, 9, 1e6), np.geomspace(50, 0.01, 9), rtol=1e-3
    )
    assert spacing.spaced([0.3], 1, "karras").tolist() == [0.3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, "karras"), "steps must be at least 1; got 0"),
        ((0, "geometric"), "steps must be at least 1; got 0"),
        ((0, "ladder"), "'ladder' has 1 to 3 steps, a ladder's levels; got 0"),
        ((4, "ladder"), "got 4"),
        ((5, "cosine"), "one of ladder, geometric, karras, polynomial; got 'cosine'"),
        ((5, "karras", 0.0), "rho must be positive; got 0.0"),
        ((5, "polynomial", -1.0), "rho must be positive; got -1.0"),
        ((5, "karras", math.nan), "rho must be positive; got nan"),
        ((5, "geometric", 2.0), "schedule 'geometric' has no rho"),
        ((2, "ladder", 2.0), "schedule 'ladder' has no rho"),
    ],
)
def test_bad_schedules_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        spacing.spaced([5.0, 1.0, 0.1], *arguments)


def test_one_level_has_nothing_between_its_ends():
    with pytest.raises(ValueError, match=r"descending; got sigmas\[0\]=0.3 <= sigmas\[1\]=0.3"):
        spacing.spaced([0.3], 2, "karras")
    with pytest.raises(ValueError, match="expected 0 < sigma_end <= sigma_begin"):
        spacing.karras(0.1, 1.0, 3)


@pytest.mark.parametrize("block", [1, 7, 40, 4096])
@pytest.mark.parametrize("kind", ["float", "offset", "uint8"])
def test_largest_distance_is_that_of_brute_force(kind, block):
    images = spread(41, 3, 5, 2, offset=100.0 if kind == "offset" else 0.0)
    if kind == "uint8":
        images = (images * 255).round().to(torch.uint8)
    found = schedule.max_pairwise_distance(images, block=block)
    assert found == pytest.approx(farthest(images), rel=1e-12)


@pytest.mark.parametrize("place", [(0, 40), (39, 40), (6, 7), (13, 14)])
def test_largest_distance_wherever_the_pair_is(place):
    images = 0.01 * spread(41, 1, 4, 4)
    images[place[0]] += 0.7
    images[place[1]] -= 0.7
    expected = float((images[place[0]].double() - images[place[1]].double()).norm())
    assert schedule.max_pairwise_distance(images, block=7) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_counts_the_blocks_that_are_compared(monkeypatch, shown):
    bars = []

    class Bar(schedule.tqdm):
        def __init__(self, *args, **options):
            bars.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(schedule, "tqdm", Bar)
    images = torch.arange(5.0).reshape(5, 1, 1, 1)
    assert schedule.max_pairwise_distance(images, block=2, progress=shown) == 4.0
    assert [(bar.n, bar.total) for bar in bars] == [(6 * shown, 6)]


def test_largest_distance_of_equal_images_is_zero():
    assert schedule.max_pairwise_distance(torch.full((5, 1, 3, 3), 0.3), block=2) == 0


def test_one_image_has_no_distance():
    with pytest.raises(ValueError, match="at least two images; got 1: give sigma_begin"):
        schedule.max_pairwise_distance(spread(1, 1, 2, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_images_that_are_no_numbers_are_refused(bad):
    images = spread(3, 1, 2, 2)
    images[1, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        schedule.max_pairwise_distance(images)


def test_large_sets_are_judged_by_a_random_subset(monkeypatch):
    monkeypatch.setattr(schedule, "EXACT_LIMIT", 30)
    monkeypatch.setattr(schedule, "SUBSET_SIZE", 12)
    images = torch.arange(31.0)[:, None, None, None]
    assert schedule.max_pairwise_distance(images[:30]) == 29  # at the limit: every pair
    found = {schedule.max_pairwise_distance(images, seed=s) for s in range(8)}
    assert found == {schedule.max_pairwise_distance(images, seed=s) for s in range(8)}
    assert len(found) > 1
    assert all(11 <= distance <= 30 for distance in found)  # 12 different ones span 11 or more


def test_published_limits():
    assert (schedule.EXACT_LIMIT, schedule.SUBSET_SIZE) == (60_000, 10_000)


@pytest.mark.parametrize(
    ("n", "side", "compared"),
    [(60_000, 32, 60_000), (60_001, 32, 10_000), (15_000, 128, 15_000), (31_000, 128, 10_000),
     (7_501, 256, 7_500)],
)  # fmt: skip
def test_large_images_are_compared_in_smaller_numbers(n, side, compared):
    chosen = schedule.compared_images(n, 3 * side**2, seed=4)
    assert (n if chosen is None else len(set(chosen.tolist()))) == compared
    at_the_limit = schedule.EXACT_LIMIT**2 * schedule.EXACT_DIM
    assert compared**2 * 3 * side**2 <= 1.01 * at_the_limit


def test_what_a_subset_misses():
    p = schedule.missed_share(1000)
    assert (1 - p) ** 500 == pytest.approx(0.05)
    exceeded = 0
    values = torch.arange(2000.0).square() / 2000**2  # pairs (0, k) and the like are the far ones
    gaps = (values[:, None] - values).abs()
    for seed in range(40):
        order = torch.randperm(2000, generator=torch.Generator().manual_seed(seed))[:1000]
        found = schedule.max_pairwise_distance(values[order][:, None, None, None])
        exceeded += float((gaps > found * (1 + 1e-6)).double().mean()) > p
    assert exceeded <= 2


def test_derive_puts_the_techniques_together():
    images = spread(20, 1, 6, 6)
    ladder = schedule.derive(images, sigma_end=0.02, c=0.6, n_steps_each=3)
    assert ladder.sigma_begin == pytest.approx(farthest(images))
    assert ladder.sigma_end == 0.02
    assert ladder.n_sigmas == schedule.n_levels(ladder.sigma_begin, 0.02, 36, 0.6)
    gamma = (ladder.sigma_begin / 0.02) ** (1 / (ladder.n_sigmas - 1))
    assert ladder.epsilon == pytest.approx(schedule.technique4(gamma, 3, 0.02), rel=1e-5)


def test_derive_refuses_equal_images():
    with pytest.raises(ValueError, match=r"nearly.* equal.*give sigma_begin and n_sigmas yourself"):
        schedule.derive(torch.full((3, 1, 4, 4), 0.5))
