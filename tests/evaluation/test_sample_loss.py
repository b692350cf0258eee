"""Distances of two sets of samples: by hand, without bias, and what a SampleLoss sees."""

import itertools
import math

import numpy as np
import pytest
import torch

from ncsn_fast.data import datasets
from ncsn_fast.evaluation.distances import BANDWIDTHS, PairDistance, polynomial_mmd
from ncsn_fast.evaluation.features import Extractor, UserFunction, load_extractor
from ncsn_fast.evaluation.metrics import frechet_distance
from ncsn_fast.evaluation.sample_loss import SampleLoss


def normals(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def by_hand(x, y, phi):
    """2 E phi(x, y) - E phi(x, x') - E phi(y, y'), pair by pair."""
    within = [
        np.mean([phi(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)
    ]  # fmt: skip
    return 2 * np.mean([phi(a, b) for a in x for b in y]) - sum(within)


@pytest.mark.parametrize("kernel", ["energy", "mmd"])
def test_pair_distances_by_hand(kernel):
    x, y = normals(5, 1, 2, 2).double(), normals(7, 1, 2, 2, seed=1).double() + 1
    scale = np.mean([float((a - b).norm()) for a, b in itertools.permutations(y, 2)])

    def phi(a, b):
        r = float((a - b).norm()) / scale
        return r if kernel == "energy" else -sum(math.exp(-r * r / (2 * s * s)) for s in BANDWIDTHS)

    distance = PairDistance(y, kernel)
    assert distance.scale == pytest.approx(scale)
    assert distance(x) == pytest.approx(by_hand(x, y, phi), rel=1e-6, abs=1e-8)


def test_kid_by_hand():
    x, y = normals(5, 3).double(), normals(4, 3, seed=1).double() + 0.5
    expected = by_hand(x, y, lambda a, b: -float((a @ b / 3 + 1) ** 3))
    assert polynomial_mmd(x, y) == pytest.approx(expected)


@pytest.mark.parametrize("kernel", ["energy", "mmd"])
def test_distances_of_equal_distributions_are_unbiased(kernel):
    distance = PairDistance(normals(2000, 8), kernel)
    found = [distance(normals(50, 8, seed=s)) for s in range(1, 60)]
    assert abs(np.mean(found)) < 4 * np.std(found) / math.sqrt(len(found)) + 2e-3
    assert min(found) < 0  # an estimate below 0 is no error
    assert distance(normals(50, 8, seed=99) + 0.5) > max(found)


def denoise(x, sigma):
    """Posterior mean of data on a line, (t, t, ..., t)."""
    return x.mean(dim=(1, 2, 3), keepdim=True).expand_as(x)


def on_the_line(n, seed=0):
    return normals(n, 1, 1, 1, seed=seed).expand(n, 1, 4, 4).contiguous()


@pytest.mark.parametrize("loss", ["energy", "mmd"])
def test_the_denoiser_sees_what_is_none_of_the_data(loss):
    """Noise that pixels hardly show: a residual of the denoiser that no reference has."""
    references = on_the_line(300)
    near, off = on_the_line(200, 1), on_the_line(200, 1) + 0.1 * normals(200, 1, 4, 4, seed=2)
    plain, whole = SampleLoss(loss, references), SampleLoss(loss, references, denoise=denoise)
    assert abs(plain(off) - plain(near)) < 0.02
    assert whole(off) > whole(near) + 2 * abs(plain(off) - plain(near))
    assert whole(off) == whole(off.clone())  # the same noise in each call
    assert whole(near + 1) > whole(near) + 0.1


def test_noise_levels_stay_within_the_models():
    seen = []

    def record(x, sigma):
        seen.append(sigma)
        return x + sigma

    SampleLoss("energy", on_the_line(20), denoise=record, limits=(0.3, 0.4))
    assert sorted(set(seen)) == sorted({min(max(s, 0.3), 0.4) for s in seen})
    assert 1 <= len(seen) <= 3


@pytest.mark.parametrize("loss", ["frechet", "kid"])
def test_losses_of_features(loss):
    extractor = load_extractor("digits")
    references, samples = (torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(s))
                           for s in range(2))  # fmt: skip
    found = SampleLoss(loss, references, extractor=extractor)(samples)
    levels = [(x * 255).round().byte() for x in (samples, references)]
    a, b = (extractor(x)[0].double() for x in levels)
    expected = {"frechet": frechet_distance(a.numpy(), b.numpy()), "kid": polynomial_mmd(a, b)}
    assert found == pytest.approx(expected[loss], rel=0.05, abs=1e-3)


@pytest.mark.parametrize("loss", ["energy", "mmd"])
def test_an_extractor_is_one_more_view(loss):
    """Its features, and by how much its largest logit exceeds the second."""
    extractor = load_extractor("digits")
    references = datasets.digits("held-out", 16)[0][:60].float() / 255
    samples = (references + references.roll(1, 0)) / 2  # between two digits
    found = SampleLoss(loss, references, extractor=extractor)(samples)
    seen = []
    for images in (references, samples):
        features, logits = extractor((images * 255).round().byte())
        ordered = logits.double().sort(1, descending=True).values
        seen.append([images, features.double(), (ordered[:, 0] - ordered[:, 1])[:, None]])
    parts = [PairDistance(a, loss)(b) for a, b in zip(*seen, strict=True)]
    assert found == pytest.approx(sum(parts) / 3, rel=0.02)
    assert parts[2] > 0.1


def test_an_extractor_may_have_no_logits():
    extractor = Extractor(UserFunction(lambda x: x.double().flatten(1)[:, 90:95]), "user", "0")
    references = datasets.digits("held-out", 16)[0][:60].float() / 255
    samples = references.roll(1, -1)
    parts = [PairDistance(x)(y) for x, y in
             ((references, samples), (references[:, 0].flatten(1)[:, 90:95],
                                      samples[:, 0].flatten(1)[:, 90:95]))]  # fmt: skip
    found = SampleLoss("energy", references, extractor=extractor)(samples)
    assert found == pytest.approx(sum(parts) / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SampleLoss("frechet", on_the_line(9)), "is of features: name an extractor"),
        (lambda: SampleLoss("fid", on_the_line(9)), "loss must be energy, mmd, frechet or kid"),
        (lambda: PairDistance(on_the_line(1)), "needs 2 samples on each side; got 1"),
        (lambda: PairDistance(torch.zeros(3, 2)), "finite and differ from each other"),
        (lambda: PairDistance(torch.full((3, 2), torch.nan)), "finite and differ"),
        (lambda: PairDistance(on_the_line(9), "rbf"), "kernel must be 'energy' or 'mmd'"),
        (lambda: polynomial_mmd(torch.zeros(1, 2), torch.zeros(2, 2)), "KID needs 2 samples"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
