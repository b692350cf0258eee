"""FID, KID and inception scores beside closed forms, and what must not change them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ncsn_fast.evaluation import fidelity
from ncsn_fast.evaluation.features import Extractor, load_extractor
from ncsn_fast.evaluation.fidelity import Fidelity
from ncsn_fast.evaluation.metrics import Statistics, frechet_distance
from ncsn_fast.evaluation.statistics_file import load_statistics, save_statistics

pytest.importorskip("torchmetrics")


class Corner(nn.Module):
    """Features: the four levels of the first channel's first row; logits: the first three."""

    def forward(self, x):
        levels = (255 * x[:, 0, 0, :4]).round()
        return levels, levels[:, :3]


CORNER = Extractor(Corner(), "corner", "0" * 64)
CORNER.inception = True


def images(levels) -> torch.Tensor:
    """Grey images (N, 1, 2, 4) whose first row is these levels (N, 4)."""
    levels = torch.as_tensor(np.asarray(levels)).to(torch.uint8)
    return torch.cat((levels[:, None, None], torch.zeros(len(levels), 1, 1, 4).byte()), dim=2)


def random_levels(n, seed, high=60):
    rng = np.random.default_rng(seed)
    return rng.integers(0, high, (n, 4)) + rng.integers(0, 20, (n, 1))


def fidelity_of(samples, references, batch=7, **options):
    found = Fidelity(CORNER, len(samples), len(references), **options)
    for part in images(references).split(batch):
        found.add(part, real=True)
    for part in images(samples).split(batch):
        found.add(part, real=False)
    return found.figures()


def test_frechet_distance_is_that_of_the_features():
    a, b = random_levels(60, 0), random_levels(45, 1, high=90)
    found = fidelity_of(a, b)
    assert found["n"] == 60
    assert found["frechet_distance"] == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_frechet_distance_is_that_of_torchmetrics():
    """Which takes another way, eigenvalues of the product: equal where both are regular."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = random_levels(60, 0), random_levels(45, 1, high=90)
    network = nn.Identity()
    network.num_features = 4
    other = FrechetInceptionDistance(feature=network, normalize=True)
    for levels, real in ((a, False), (b, True)):
        other.update(torch.from_numpy(levels).double(), real=real)
    assert fidelity_of(a, b)["frechet_distance"] == pytest.approx(float(other.compute()), rel=1e-6)


def test_images_are_at_no_distance_of_themselves():
    """Of three, too, whose covariance of rank 2 has four columns."""
    for n in (3, 60):
        a = random_levels(n, 0)
        scale = float(np.trace(np.cov(a, rowvar=False)))
        assert 0 <= fidelity_of(a, a)["frechet_distance"] < 1e-9 * scale


def test_one_sample_has_no_distance():
    found = Fidelity(CORNER, 1, 5)
    found.add(images(random_levels(5, 0)), real=True)
    found.add(images(random_levels(1, 0)), real=False)
    with pytest.raises(ValueError, match="needs two samples at least; got 1"):
        found.figures()


def test_a_shift_of_every_level_is_its_square():
    a = random_levels(50, 2)
    found = fidelity_of(a + np.array([3, 0, 4, 0]), a)
    assert found["frechet_distance"] == pytest.approx(25, rel=1e-6)


def test_batches_do_not_matter():
    a, b = random_levels(40, 3), random_levels(30, 4)
    whole, parts = fidelity_of(a, b, batch=64), fidelity_of(a, b, batch=3)
    for figures in (whole, parts):
        assert figures["kid"].pop("std") > 0
    assert parts["frechet_distance"] == pytest.approx(whole["frechet_distance"], rel=1e-9)
    assert parts["kid"] == pytest.approx(whole["kid"], rel=1e-9)
    assert parts["inception_score"] == pytest.approx(whole["inception_score"], rel=1e-9)


def test_kid_is_the_unbiased_estimate_of_the_papers_kernel(monkeypatch):
    """Every pair of one subset by hand: MMD^2 with (x.y / 4 + 1)^3 (Binkowski et al. 2018)."""
    monkeypatch.setattr(fidelity, "KID_SUBSETS", 1)
    a, b = (random_levels(8, seed, high=5) for seed in (5, 6))
    found = fidelity_of(a, b, seed=3)["kid"]
    assert (found["subset_size"], found["samples"], found["references"]) == (4, 8, 8)
    torch.manual_seed(3)
    y, x = (levels[torch.randperm(8)[:4].numpy()].astype(float) for levels in (b, a))

    def kernel(p, q):
        return (p @ q.T / 4 + 1) ** 3

    def apart(k):
        return (k.sum() - np.trace(k)) / 12

    expected = apart(kernel(x, x)) + apart(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert found["mean"] == pytest.approx(expected, rel=1e-9)


def test_kid_keeps_an_even_part_of_many_and_leaves_global_randomness_alone(monkeypatch):
    monkeypatch.setattr(fidelity, "KID_MAX_IMAGES", 10)
    a, b = random_levels(25, 7), random_levels(40, 8)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    few = fidelity_of(a, b, seed=1)["kid"]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (few["samples"], few["references"], few["subset_size"]) == (10, 10, 10)
    keep = [(i + 1) * 10 // 40 > i * 10 // 40 for i in range(40)]
    assert sum(keep) == 10
    chosen = [(i + 1) * 10 // 25 > i * 10 // 25 for i in range(25)]
    monkeypatch.undo()
    monkeypatch.setattr(fidelity, "KID_SUBSET_SIZE", 5)
    monkeypatch.setattr(fidelity, "KID_MAX_IMAGES", 10)
    by_hand = fidelity_of(a[chosen], b[keep], seed=1)["kid"]
    again = fidelity_of(a, b, seed=1)["kid"]
    assert again == pytest.approx(by_hand)


def test_generators_of_gpus_are_left_alone(monkeypatch):
    """torch.manual_seed would reseed them, and nothing would put them back."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(7)
    assert seeded == [7]
    assert fidelity_of(random_levels(20, 7), random_levels(20, 8))["kid"]["std"] > 0
    assert seeded == [7]


def test_inception_score_of_sure_and_of_unsure_samples():
    """exp(mean KL): the number of classes where each is sure and they are even; else 1."""
    even = np.repeat(np.eye(4, dtype=int)[:3] * 200, 10, axis=0)  # 3 classes, logits 200 apart
    spread = even[np.arange(30).reshape(3, 10).T.ravel()]  # 0, 1, 2, 0, 1, 2, ...
    found = fidelity_of(spread, spread)["inception_score"]
    assert found == pytest.approx({"mean": 3, "std": 0, "splits": 10}, abs=1e-9)
    unsure = fidelity_of(np.full((30, 4), 7), spread)["inception_score"]
    assert unsure == pytest.approx({"mean": 1, "std": 0, "splits": 10}, abs=1e-9)


def test_inception_score_is_that_of_its_splits():
    a = random_levels(33, 9, high=4)
    logits = torch.as_tensor(a[:, :3], dtype=torch.float64)
    scores = []
    for k in range(10):
        p = logits[k * 33 // 10 : (k + 1) * 33 // 10].softmax(1)
        scores.append(float((p * (p / p.mean(0)).log()).sum(1).mean().exp()))
    found = fidelity_of(a, a, batch=4)["inception_score"]
    assert found["mean"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert found["std"] == pytest.approx(np.std(scores), rel=1e-6)


def test_references_from_a_file(tmp_path):
    a, b = random_levels(60, 10), random_levels(45, 11, high=90)
    whole = Fidelity(CORNER, len(a), len(b))
    whole.add(images(b), real=True)
    statistics = whole.statistics(real=True)
    np.testing.assert_allclose(statistics.mu, b.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.sigma, np.cov(b, rowvar=False), rtol=1e-9)
    save_statistics(tmp_path / "stats.npz", statistics, CORNER)
    read = load_statistics(tmp_path / "stats.npz", CORNER)
    assert read.n == 45
    found = Fidelity(CORNER, len(a), None)
    found.use_references(read)
    found.add(images(a), real=False)
    figures = found.figures()
    assert figures["frechet_distance"] == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert figures["kid"] == {"left_out": "the reference is mu and sigma; KID needs the images"}
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as file:
        assert {"mu", "sigma"} <= set(file.files)


def test_far_means_keep_the_distance():
    """Of statistics with a mean of 1000 and a spread of 1e-3, nothing is lost."""
    found = Fidelity(CORNER, 10, None)
    given = Statistics(np.full(4, 1000.0), 1e-6 * np.eye(4))
    found.use_references(given)
    assert found.statistics(real=True) is given
    a = random_levels(10, 0)
    found.add(images(a), real=False)
    sigma = np.cov(a, rowvar=False)  # commutes with a multiple of the identity
    roots = np.sqrt(np.linalg.eigvalsh(sigma))
    expected = ((a.mean(0) - 1000) ** 2).sum() + ((roots - 1e-3) ** 2).sum()
    assert found.figures()["frechet_distance"] == pytest.approx(expected, rel=1e-12)


GOOD = {"mu": np.zeros(4), "sigma": np.eye(4)}
SKEW = np.eye(4) + np.triu(np.ones((4, 4)), 1)


@pytest.mark.parametrize(("change", "text"), [
    ({"mu": None}, "it has no mu"), ({"mu": np.zeros(5)}, "4 features"),
    ({"sigma": np.eye(3)}, r"of shape \(4, 4\); got .* \(3, 3\)"),
    ({"sigma": SKEW}, "no covariance"),
    ({"sigma": -np.eye(4)}, "no covariance"), ({"mu": np.full(4, np.nan)}, "NaN"),
    ({"mu": np.array([None] * 4)}, "cannot read"),  # a pickle
    ({"extractor": np.str_("other"), "extractor_sha256": np.str_("1" * 64)}, "was made with"),
])  # fmt: skip
def test_statistics_that_do_not_fit(change, text, tmp_path):
    entries = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    np.savez(tmp_path / "stats.npz", **entries)
    with pytest.raises(ValueError, match=text):
        load_statistics(tmp_path / "stats.npz", CORNER)


def test_files_that_are_no_statistics(tmp_path):
    (tmp_path / "words.npz").write_text("words")
    for name in ("words.npz", "nowhere.npz"):
        with pytest.raises(ValueError, match=f"{name} as an npz file of mu and sigma"):
            load_statistics(tmp_path / name, CORNER)


def test_what_may_be_called_fid(monkeypatch):
    a = random_levels(40, 12)
    assert "not comparable with published FIDs" in fidelity_of(a, a)["note"]
    monkeypatch.setattr(fidelity, "MIN_SAMPLES_FOR_FID", 40)
    found = fidelity_of(a, a)
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert "note" not in found
    assert "frechet_distance" not in found
    few = fidelity_of(a, a[:4])
    assert "fewer images than 4 features: the covariance is singular" in few["note"]
    digits = Fidelity(load_extractor("digits"), 40, 40)
    for real in (False, True):
        digits.add(images(a), real=real)
    found = digits.figures()
    assert "fid" not in found
    assert "not of Inception features" in found["note"]


def test_no_more_images_than_were_announced():
    found = Fidelity(CORNER, 10, 10)
    with pytest.raises(ValueError, match="expected 10 images; got 11"):
        found.add(images(random_levels(11, 13)), real=False)


def test_without_logits_there_is_no_inception_score():
    class Plain(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4], None

    found = Fidelity(Extractor(Plain(), "plain", "0" * 64), 10, 10)
    for real in (False, True):
        found.add(images(random_levels(10, 14)), real=real)
    figures = found.figures()
    assert figures["inception_score"] == {"left_out": "the extractor gives no logits"}
    assert math.isfinite(figures["kid"]["mean"])
