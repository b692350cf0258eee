"""Denoisers of deepinv's form, ours for them and theirs for us.

The package's own base class is taken where it is installed. It depends on torchvision, which has no
build for CPUs in every index: else a module of the form that its documentation gives stands in.
"""

import importlib.util

import pytest
import torch
from drawing import tiny

import ncsn_fast
from ncsn_fast import Sampler
from ncsn_fast.models.denoiser import Denoiser


def base() -> type[torch.nn.Module]:
    """The base class of deepinv's denoisers, or of all modules."""
    if importlib.util.find_spec("deepinv") is None:
        return torch.nn.Module
    return pytest.importorskip("deepinv.models", exc_type=ImportError).Denoiser


@pytest.fixture(scope="module")
def model():
    return tiny()


X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [0.3, torch.tensor(0.3), torch.full((2,), 0.3),
                                   torch.full((2, 1, 1, 1), 0.3)])  # fmt: skip
def test_sigma_in_every_form(model, sigma):
    torch.testing.assert_close(Denoiser(model)(X, sigma), model.denoise(X, 0.3))


def test_each_image_has_its_own_level_and_clean_ones_stay(model):
    found = Denoiser(model)(X, torch.tensor([0.0, 0.5]))
    assert torch.equal(found[0], X[0])
    torch.testing.assert_close(found[1:], model.denoise(X[1:], 0.5))


def test_gradients_of_a_model_and_an_engine_without(model):
    x = X.clone().requires_grad_()
    Denoiser(model)(x, 0.5).square().sum().backward()
    assert x.grad.abs().sum() > 0
    fast = Denoiser(Sampler(model, engine="eager", device="cpu"))
    torch.testing.assert_close(fast(X, 0.5), model.denoise(X, 0.5))
    assert not any(True for _ in fast.parameters())
    assert any(True for _ in Denoiser(model).parameters())


def test_other_numbers_of_levels_are_refused(model):
    with pytest.raises(ValueError, match=r"one for each of 2 images; got \(3,\)"):
        Denoiser(model)(X, torch.ones(3))


class Shrinking(base()):
    """Posterior mean of a standard normal around 1/2, a denoiser with a closed form."""

    def forward(self, x, sigma, **_):
        sigma = torch.as_tensor(sigma).reshape(-1, *[1] * (x.ndim - 1))
        return 0.5 + (x - 0.5) / (1 + sigma**2)


def test_a_denoiser_of_theirs_is_wrapped():
    theirs = ncsn_fast.wrap(
        Shrinking(), predicts="denoised", sees="sigma", image_shape=(1, 4, 4),
        sigma_min=0.01, sigma_max=20.0, data_range=(0.0, 1.0),
    )  # fmt: skip
    x = torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(theirs.score(x, 2.0), (0.5 - x) / (1 + 2.0**2))
    images = Sampler(theirs, engine="eager").sample(2, method="heun", progress=False)
    assert images.isfinite().all()
    again = Denoiser(theirs)
    torch.testing.assert_close(again(x, 2.0), Shrinking()(x, torch.tensor(2.0)))
