"""Restoring, guiding and varying images by Sampler, on models whose score is known."""

import dataclasses
import math

import gaussian
import numpy as np
import pytest
import torch
from drawing import TINY, photos, tiny
from PIL import Image

from ncsn_fast import Sampler, ScoreModel
from ncsn_fast.inference.editing import fitted
from ncsn_fast.ops.noise import Stream, normal
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.guidance import Conditional, classifier_gradient
from ncsn_fast.samplers.operators import (
    Grey,
    Linear,
    Mask,
    block_mean,
    gaussian_blur,
)

SHAPE = (3, 8, 8)
SPREAD = 0.05


class Blobs(ScoreModel):
    """Data of equal shares of N(centre, SPREAD^2 I); the network knows its trained levels alone."""

    def __init__(self, centres):
        super().__init__(CONFIG)
        self.register_buffer("centres", centres)

    def forward(self, x, condition=None):
        variance = (SPREAD**2 + self.sigmas[condition] ** 2)[:, None, None, None]
        share = logits(self.centres, x, variance.flatten()).softmax(1)
        return (torch.einsum("bk,kchw->bchw", share, self.centres) - x) / variance


def logits(centres, x, variance):
    distance = (x[:, None] - centres.to(x)).square().flatten(2).sum(2)
    return -distance / (2 * variance[:, None])


CONFIG = dataclasses.replace(
    TINY, arch="ncsn", channels=3, n_sigmas=30, sigma_begin=1.0, sigma_end=0.01, epsilon=2e-5
)
ONE = 0.3 + 0.4 * photos(1, seed=1)
THREE = 0.3 + 0.4 * photos(3, seed=2)


@pytest.fixture(scope="module")
def one():
    """A Sampler of N(ONE, SPREAD^2 I)."""
    return Sampler(Blobs(ONE), engine="eager", batch_size=4)


@pytest.fixture(scope="module")
def three():
    return Sampler(Blobs(THREE), engine="eager", batch_size=16)


def kernel(x):
    k = torch.tensor([[0.0, 0.2, 0.1], [0.3, 0.3, 0.0], [0.1, 0.0, 0.0]], dtype=x.dtype)
    return torch.nn.functional.conv2d(x, k.expand(3, 1, 3, 3), groups=3)


OPERATORS = {
    "grey": Grey(),
    "block mean": block_mean(2, 8, 8),
    "blur": gaussian_blur(0.4, 8, 8),
    "own": Linear(kernel, SHAPE),
    "masks": Mask(photos(3, seed=5) > 0.5),
}
METHODS = {
    "ald": {"n_steps_each": 2}, "cas": {}, "dpmpp": {"steps": 12}, "heun": {"steps": 10},
    "em": {"steps": 30}, "reverse": {"denoise": False}, "pc": {"steps": 15},
    "ode": {"rtol": 0.02, "atol": 0.02}, "adaptive": {"rtol": 0.1, "atol": 0.02},
}  # fmt: skip


def truth(n=3):
    """Images of the data."""
    return ONE + SPREAD * normal(3, torch.arange(n), Stream.INITIAL, 9, SHAPE)


@pytest.mark.parametrize(
    ("method", "name"), [*((m, "grey") for m in METHODS), *(("cas", name) for name in OPERATORS)]
)
def test_restored_images_measure_what_was_measured(one, method, name):
    images, operator = truth(), OPERATORS[name]
    y = operator.apply(images)
    found = one.restore(y, operator, method=method, progress=False, **METHODS[method])
    torch.testing.assert_close(operator.apply(found), y, rtol=0, atol=1e-5)
    assert ((found - images).abs().max() > 0.05) == (name != "blur")
    assert float((found - ONE).square().mean().sqrt()) < 2 * SPREAD
    assert one.report.method == method


@pytest.mark.parametrize("how", ["imposed", "projected"])
def test_each_image_has_its_own_measurement_and_noise(one, how):
    """In another micro-batch, at another place of it, a sample is the same."""
    masks = OPERATORS["masks"]
    y = masks.apply(truth())
    options = {"how": how, "method": "cas", "progress": False}
    together = Sampler(one.model, engine="eager", batch_size=2).restore(y, masks, **options)
    alone = one.restore(y[2:], Mask(masks.known[2:]), start=2, **options)
    torch.testing.assert_close(alone, together[2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["grey", "block mean"])
def test_images_within_their_range_are_fitted(name):
    """From anywhere, also where the nearest image that measures y leaves [0, 1]."""
    operator = OPERATORS[name]
    dark = 0.2 * photos(3, seed=8) ** 2
    x = normal(0, torch.arange(3), 9, 0, SHAPE).clamp(0, 1)
    y = operator.apply(dark)
    outside = operator.correct(x, y)
    assert outside.min() < -0.05
    found = fitted(x, operator, y)
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(operator.apply(found), y, rtol=0, atol=1e-5)
    assert torch.equal(fitted(x[1:2], operator, y[1:2]), found[1:2])
    assert torch.equal(fitted(dark, operator, y), dark)


def test_noise_is_weighed_against_the_data():
    """The posterior of N(m, s^2) data given y = x + noise z, mean and spread, at every pixel."""
    sampler = Sampler(Blobs(ONE), engine="eager", batch_size=24)
    noise, everything = 0.05, Mask(torch.ones(1, *SHAPE, dtype=torch.bool))
    y = (ONE + 0.06).expand(24, *SHAPE)
    found = sampler.restore(y, everything, noise=noise, method="ancestral", progress=False)
    mean = float((found - ONE).mean())
    # Exactly weighed, the mean lies half-way; no limit to the data's spread is known here, so that
    # measurements count for more.
    assert 0.03 < mean < 0.05
    spread = float((found - found.mean(0)).std())
    assert 0.5 * SPREAD / math.sqrt(2) < spread < SPREAD
    exact = sampler.restore(y, everything, method="ancestral", progress=False)
    torch.testing.assert_close(exact, y.contiguous(), rtol=0, atol=1e-6)


def test_imposing_a_mask_is_inpainting(one):
    mask = OPERATORS["masks"]
    images = truth()
    options = {"method": "dpmpp", "progress": False}
    found = one.restore(mask.apply(images), mask, how="imposed", **options)
    assert torch.equal(found, one.inpaint(images, mask.known, **options))


@pytest.mark.parametrize("method", ["ald", "pc", "ode", "adaptive"])
@pytest.mark.parametrize("variant", [None, "projected"])
def test_inpainting_with_every_kind_of_method(one, method, variant):
    images, mask = truth(), torch.arange(8) < 4
    options = {"method": method, "variant": variant, "progress": False, **METHODS[method]}
    found = one.inpaint(images, mask, **options)
    keep = mask.expand(found.shape)
    assert torch.equal(found[keep], images[keep])
    error = float((found - ONE)[~keep].square().mean().sqrt())
    assert 0.5 * SPREAD < error < 2 * SPREAD
    images[~keep] = -77.0  # unknown pixels may hold anything
    assert torch.equal(one.inpaint(images, mask, **options), found)
    if method in ("ode", "adaptive"):
        with pytest.raises(ValueError, match="imposes nothing"):
            one.inpaint(images, mask, **{**options, "variant": "ncsnv2"})


def test_the_named_tasks_are_their_operators(one):
    images, options = truth(), {"method": "cas", "seed": 5, "progress": False}
    grey = Grey().apply(images)
    found = one.colourise(grey, **options)
    assert torch.equal(found, one.restore(grey, Grey(), **options))
    torch.testing.assert_close(found.mean(1, keepdim=True), grey, rtol=0, atol=1e-6)
    small = torch.nn.functional.avg_pool2d(images, 4)
    found = one.super_resolve(small, 4, **options)
    assert torch.equal(found, one.restore(small, block_mean(4, 8, 8), **options))
    blur = gaussian_blur(0.7, 8, 8)
    found = one.deblur(blur.apply(images), 0.7, noise=0.01, **options)
    assert torch.equal(found, one.restore(blur.apply(images), blur, noise=0.01, **options))


def test_pictures_of_8_bits(one):
    grey = (Grey().apply(truth()) * 255).round().to(torch.uint8)
    options = {"method": "cas", "output": "np", "progress": False}
    found = one.colourise(grey, **options)
    assert (found.dtype, found.shape) == (np.uint8, (3, 8, 8, 3))
    assert np.abs(found.mean(3) - grey[:, 0].numpy()).max() < 1
    pictures = [Image.fromarray(g[0].numpy()) for g in grey]
    np.testing.assert_array_equal(one.colourise(pictures, **options), found)
    assert one.colourise(grey[:0], method="cas", progress=False).shape == (0, *SHAPE)


@pytest.mark.parametrize("method", ["ancestral", "ode", "pc"])
def test_guided_samples_are_of_their_class(three, method):
    labels = torch.arange(16) % 3

    def classifier(x, sigma):
        return logits(THREE, x, SPREAD**2 + sigma**2)

    options = {"method": method, "progress": False, **METHODS.get(method, {})}
    found = three.guided(labels, classifier, **options)
    towards = (found - THREE[labels]).square().mean((1, 2, 3)).sqrt()
    assert towards.max() < 2 * SPREAD
    assert towards.min() > 0.5 * SPREAD
    again = three.guided(labels.tolist(), gradient=classifier_gradient(classifier), **options)
    assert torch.equal(again, found)
    free = three.guided(labels, classifier, scale=0.0, **options)
    plain = three.sample(16, **options)
    torch.testing.assert_close(free, plain, rtol=0, atol=1e-4)


def test_a_class_and_a_measurement(three):
    """Grey pictures say little here; the label picks the colours."""
    labels, grey = torch.tensor([2, 0]), Grey()
    y = grey.apply(THREE[labels])
    guide = Conditional(
        classifier_gradient(lambda x, sigma: logits(THREE, x, SPREAD**2 + sigma**2)), labels
    )
    for how in ("imposed", "projected"):
        found = three.restore(y, grey, guide=guide, how=how, method="ancestral", progress=False)
        torch.testing.assert_close(grey.apply(found), y, rtol=0, atol=1e-5)
        assert (found - THREE[labels]).square().mean((1, 2, 3)).sqrt().max() < 1.5 * SPREAD


@pytest.mark.parametrize(("how", "sigma"), [
    ({"sigma": 0.3}, 0.3), ({"strength": 0.5}, 0.1), ({"strength": 1.0}, 1.0),
    ({"strength": 0}, 0.01),
])  # fmt: skip
def test_sdedit_starts_with_noise_and_runs_what_is_left(one, how, sigma):
    """Euler's method follows the exact flow of the levels below, from image + sigma z."""
    images = truth(2)
    found = one.sdedit(images, method="euler", schedule="ladder", seed=7, progress=False, **how)
    ladder = one.model.sigmas.double().numpy()
    start = ladder[np.abs(np.log(ladder / sigma)).argmin()]
    program = methods.build(
        "euler", one.model, None, {"schedule": "ladder", "sigma_start": float(start)}
    )
    assert one.report.nfe == program.nfe
    assert program.sigma[0] == pytest.approx(start)
    z = normal(7, torch.arange(2), Stream.INITIAL, 0, SHAPE)
    data = gaussian.Data(0.0, SPREAD**2)
    factor = gaussian.follow(program, data, 1.0)
    expected = ONE + factor * (images + float(start) * z - ONE)
    torch.testing.assert_close(found, expected.clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_sdedit_with_every_method(one, method):
    """The less noise, the nearer to what was given, which the model would not have drawn."""
    given = (ONE + 0.25).clamp(0, 1)
    options = {"method": method, "progress": False, **METHODS[method]}
    moved = []
    for sigma in (0.02, 1.0):
        found = one.sdedit(given, sigma=sigma, **options)
        moved.append(float((found - given).square().mean().sqrt()))
    assert moved[0] < 0.7 * moved[1]
    assert float((found - ONE).square().mean().sqrt()) < 2 * SPREAD


HALF = torch.full((2, 3, 8, 8), 0.5)


@pytest.mark.parametrize(("call", "message"), [
    (lambda s: s.restore(torch.zeros(2, 3, 8, 8), Grey()), r"measurements must be \(2, 1, 8, 8\)"),
    (lambda s: s.restore(torch.tensor(1.0), Grey()), r"measurements must be \(0, 1, 8, 8\); got"),
    (lambda s: s.restore(torch.full((1, 1, 8, 8), math.nan), Grey()), "hold NaN"),
    (
        lambda s: s.restore(HALF, OPERATORS["masks"]),
        r"the operator does not take 2 images \(3, 8, 8\): .*size of tensor",
    ),
    (lambda s: s.restore(HALF[:, :1], Grey(), noise=-1.0), "noise must be at least 0"),
    (lambda s: s.restore(HALF[:, :1], Grey(), how="by hand"), "how must be 'projected' or"),
    (lambda s: s.restore(HALF[:, :1], Grey(), how="imposed", noise=0.1), "without noise"),
    (lambda s: s.restore(HALF[:, :1], Grey(), how="imposed", method="ode"), "imposes nothing"),
    (lambda s: s.restore(HALF[:, :1], Grey(), output="jpg"), "output must be"),
    (lambda s: s.inpaint(HALF, True, variant="x", method="pc"), "'ncsnv2' or 'ncsn'; got 'x'"),
    (lambda s: s.colourise(HALF), r"images \(N, 1, 8, 8\)"),
    (lambda s: s.colourise(3 * HALF[:, :1]), r"images must be in \[0, 1\]"),
    (lambda s: s.super_resolve(HALF, 3), "factor must divide 8 and 8; got 3"),
    (lambda s: s.super_resolve(HALF, 0), "factor must divide 8 and 8; got 0"),
    (lambda s: s.super_resolve(HALF, 2), r"images \(N, 3, 4, 4\)"),
    (lambda s: s.deblur(HALF, -1.0), "positive and finite; got -1.0"),
    (lambda s: s.deblur(HALF - 1, 1.0), r"map images in \[-1, 1\]"),
    (lambda s: s.guided([0]), "either a classifier or a gradient"),
    (lambda s: s.guided(3, lambda x, sigma: x), "one number"),
    (lambda s: s.guided([0], lambda x, sigma: x), r"logits \(1, K\) for one image"),
    (lambda s: s.sdedit(HALF), "either sigma"),
    (lambda s: s.sdedit(HALF, sigma=0.1, strength=0.1), "either sigma"),
    (lambda s: s.sdedit(HALF, strength=1.1), r"strength must be in \[0, 1\]; got 1.1"),
    (lambda s: s.sdedit(HALF, sigma=0.001), "on the model's ladder, from 0.01 to 1; got 0.001"),
    (lambda s: s.sdedit(HALF, sigma=math.nan), "on the model's ladder"),
    (lambda s: s.sdedit(2 * HALF + 1, strength=0.1), r"images must be in \[0, 1\]"),
])  # fmt: skip
def test_refuses(one, call, message):
    with pytest.raises(ValueError, match=message):
        call(one)


def test_colours_need_a_model_of_them():
    with pytest.raises(ValueError, match=r"needs a model of RGB images; .* have 1 channel$"):
        Sampler(tiny(channels=1), engine="eager").colourise(HALF[:, :1])
