"""Inpainting, interpolation, scores and denoising by Sampler, on tiny networks."""

import itertools
import math

import numpy as np
import pytest
import torch
from drawing import CLOSE, draw, photos, tiny
from PIL import Image

from ncsn_fast import (
    Sampler,
)

MASKS = {
    "one for all": torch.arange(64).reshape(8, 8) % 3 == 0,
    "rows": (torch.arange(8) < 3)[:, None],
    "one per channel": torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5,
    "one per image": torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.5,
    "numbers": (torch.arange(8.0) - 4).clamp(0, 1),
    "list": [[0, 1, 0, 1, 0, 0, 1, 1]] * 8,
    "array": np.eye(8),
    "all": True,
    "none": False,
}


@pytest.mark.parametrize("variant", ["ncsnv2", "ncsn"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_inpainting_returns_known_pixels_exactly(plain, mask, variant):
    def inpaint(images):
        return plain.inpaint(images, mask, variant=variant, n_steps_each=1, progress=False)

    images, known = photos(), (torch.as_tensor(mask) != 0).expand(2, 3, 8, 8)
    images[~known] = 0.123
    out = inpaint(images)
    assert torch.equal(out[known], photos()[known])
    if not known.all():
        assert (out[~known] - 0.123).abs().max() > 0.1
        images[~known] = -77.0  # unknown pixels may hold anything
        assert torch.equal(inpaint(images), out)


@pytest.mark.parametrize("variant", ["ncsnv2", "ncsn"])
def test_inpainting_with_every_network_and_engine(sampler, variant):
    mask = MASKS["one per image"].expand(2, 3, 8, 8)
    out = sampler.inpaint(photos(), mask, variant=variant, method="cas", progress=False)
    assert torch.equal(out[mask], photos()[mask])
    assert not torch.allclose(out[~mask], photos()[~mask], atol=0.1)


def test_inpainting_nothing_known_is_sampling(sampler):
    out = sampler.inpaint(photos(), False, seed=3, start=4, progress=False)
    assert torch.equal(out, draw(sampler, 2, seed=3, start=4))


def test_inpainting_variants_and_seeds_differ(plain):
    mask = MASKS["one for all"]
    outs = [
        plain.inpaint(photos(), mask, progress=False, **options)
        for options in ({}, {"variant": "ncsn"}, {"seed": 1}, {"start": 1}, {"method": "cas"})
    ]
    for i, a in enumerate(outs):
        assert all(not torch.allclose(a, b, atol=0.05) for b in outs[:i])


def test_inpainting_of_8_bit_images_gives_their_bytes_back(plain):
    images = (photos().permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    mask = MASKS["one for all"].numpy()
    out = plain.inpaint(images, mask, output="np", progress=False)
    np.testing.assert_array_equal(out[:, mask], images[:, mask])
    pils = [Image.fromarray(i) for i in images]
    np.testing.assert_array_equal(plain.inpaint(pils, mask, output="np", progress=False), out)


@pytest.mark.parametrize(
    "mask", [torch.ones(7, 8), torch.ones(3, 3, 8, 8), torch.ones(1, 2, 3, 8, 8)]
)
def test_masks_that_do_not_fit_are_refused(plain, mask):
    with pytest.raises(ValueError, match=r"mask must broadcast to the images \(2, 3, 8, 8\)"):
        plain.inpaint(photos(), mask, progress=False)


def test_interpolation(sampler):
    frames = sampler.interpolate(2, 4, seed=3, start=5, progress=False).reshape(2, 4, 3, 8, 8)
    samples = draw(sampler, 2, seed=3, start=5)
    assert torch.equal(frames[:, 0], samples)
    for row in frames:
        steps = [(a - b).square().mean() for a, b in itertools.pairwise(row)]
        assert min(steps) > 0
        assert max(steps) < (row[0] - row[-1]).square().mean()
    assert torch.equal(sampler.interpolate(2, 1, seed=3, start=5, progress=False), samples)
    assert sampler.interpolate(0, 4, progress=False).shape == (0, 3, 8, 8)


def test_scores_are_the_models(sampler):
    model, x = sampler.model, photos(4)
    for sigma in (2.0, 0.3, 0.1):
        expected = model.score(x, sigma).detach()
        error = (sampler.score(x, sigma) - expected).abs().max() / expected.abs().max()
        assert error < 2e-5
    assert sampler.score(photos(0), 1.0).shape == (0, 3, 8, 8)


def test_denoising_is_tweedies_formula(sampler):
    x = photos(4)
    expected = (x + 0.3**2 * sampler.model.score(x, 0.3).detach()).clamp(0, 1)
    torch.testing.assert_close(sampler.denoise(x, 0.3), expected, **CLOSE)
    assert sampler.denoise(x, 0.3, output="np").shape == (4, 8, 8, 3)


@pytest.mark.parametrize("soft", [0.5, 255, math.nan])
def test_soft_masks_are_refused(plain, soft):
    with pytest.raises(ValueError, match="boolean, or 0 and 1"):
        plain.inpaint(photos(), torch.full((8, 8), soft), progress=False)


def test_known_pixels_of_another_range_are_refused(plain):
    images, mask = 2 * photos() - 1, MASKS["one for all"]
    with pytest.raises(ValueError, match=r"map images in \[-1, 1\]"):
        plain.inpaint(images, mask, progress=False)
    images[:, :, ~mask] = -7  # unknown pixels may hold anything finite
    known = photos()[:, :, mask]
    images[:, :, mask] = known
    assert torch.equal(plain.inpaint(images, mask, progress=False)[:, :, mask], known)


OF_IMAGES = {
    "inpaint": lambda s, x: s.inpaint(x, True, progress=False),
    "sdedit": lambda s, x: s.sdedit(x, strength=0.5, progress=False),
    "colourise": lambda s, x: s.colourise(x[:, :1], progress=False),
    "super_resolve": lambda s, x: s.super_resolve(x[..., ::2, ::2], 2, progress=False),
    "deblur": lambda s, x: s.deblur(x, 1.0, progress=False),
    "denoise": lambda s, x: s.denoise(x, 0.01),
    "log_likelihood": lambda s, x: s.log_likelihood(x, rtol=0.1, atol=0.1),
}


@pytest.mark.parametrize("name", OF_IMAGES)
def test_images_of_another_range_are_refused_alike(plain, name):
    images = photos()
    images[:, :, 0, 0], images[:, :, 0, 2] = 0, 1
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\]; got 0 to 255: divide"):
        OF_IMAGES[name](plain, 255 * images)
    with pytest.raises(ValueError, match=r"got -1 to 1: map images in \[-1, 1\] with \(x"):
        OF_IMAGES[name](plain, 2 * images - 1)


def test_masks_that_are_pil_images_are_refused(plain):
    with pytest.raises(ValueError, match=r"must be an array or tensor; convert it: np\.asarray"):
        plain.inpaint(photos(), Image.new("1", (8, 8)), progress=False)


def test_scores_at_one_sigma_per_image(model):
    sampler, x = Sampler(model, engine="eager"), photos(3)
    together = sampler.score(x, torch.tensor([2.0, 0.5, 0.1]))
    each = torch.cat([sampler.score(x[i : i + 1], s) for i, s in enumerate((2.0, 0.5, 0.1))])
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-4 * each.abs().max().item())
    with pytest.raises(ValueError, match=r"sigma must be a number or \(3,\)"):
        sampler.score(x, torch.ones(2))


@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_no_steps_still_return_known_pixels(engine):
    images, mask = photos(), MASKS["one for all"]
    sampler = Sampler(tiny(), engine=engine)
    out = sampler.inpaint(images, mask, n_steps_each=0, denoise=False, progress=False)
    assert (sampler.report.nfe, torch.equal(out[:, :, mask], images[:, :, mask])) == (0, True)
