"""Samplers of k-diffusion as methods: the package's own where it is installed, else stand-ins.

k-diffusion depends on torchvision, which has no build for CPUs in every index; the stand-ins of
tests/support/k_diffusion_form.py are written in the form that its documentation gives.
"""

import importlib.util

import k_diffusion_form
import pytest
import torch
from drawing import tiny

from ncsn_fast import Sampler

LEVELS = {"sigmas": (5.0, 2.0, 0.5, 0.1)}


def form():
    """The package, if it can be imported, else the stand-ins."""
    if importlib.util.find_spec("k_diffusion") is None:
        return k_diffusion_form
    return pytest.importorskip("k_diffusion.sampling", exc_type=ImportError)


@pytest.fixture(scope="module")
def sampler():
    return Sampler(tiny(), engine="eager", device="cpu", batch_size=2)


def draw(sampler, n=3, **options):
    return sampler.sample(n, progress=False, **options)


def test_eulers_method_is_that_of_this_package(sampler):
    theirs = draw(sampler, method=form().sample_euler, **LEVELS)
    report = sampler.report
    assert (report.method, report.nfe, report.n) == ("sample_euler", 4, 3)
    ours = draw(sampler, method="euler", **LEVELS)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_noise_follows_the_contract(sampler):
    method = form().sample_euler_ancestral
    images = draw(sampler, n=4, method=method, **LEVELS)
    assert torch.equal(draw(sampler, n=2, start=2, method=method, **LEVELS), images[2:])
    assert not torch.equal(draw(sampler, n=4, seed=1, method=method, **LEVELS), images)
    without = draw(sampler, n=4, method=method, eta=0.0, **LEVELS)
    euler = draw(sampler, n=4, method="euler", **LEVELS)
    torch.testing.assert_close(without, euler, rtol=1e-4, atol=1e-4)


def test_levels_progress_and_edits(sampler):
    seen = []
    method = form().sample_euler
    images = draw(sampler, n=2, method=method, steps=5, callback=lambda p: seen.append(p.sigma))
    assert images.shape == (2, 3, 8, 8)
    assert sampler.report.nfe == 5
    assert seen == sorted(seen, reverse=True)
    assert len(seen) >= 5
    known = torch.rand(2, 3, 8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :4] = True
    filled = sampler.inpaint(known, mask, method=method, steps=5, progress=False)
    assert torch.equal(filled[..., :4], known[..., :4])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "sample_between",
            {},
            r"takes \(model, x, sigmas, .*; got sample_between\(model, x",
        ),
        ("sample_euler", {"churn": 1.0}, "sample_euler has no option churn; it has s_churn"),
        ("sample_euler", {"s_churn": 1.0}, "draws the noise of s_churn by itself"),
    ],
)
def test_what_cannot_be_run_is_refused(sampler, method, options, message):
    with pytest.raises(ValueError, match=message):
        draw(sampler, method=getattr(k_diffusion_form, method), **options)
