"""The training loss of networks with classes."""

import own_networks
import pytest
import tiny
import torch

import ncsn_fast
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.training.objective import Objective

LABELS = torch.tensor([2, 0, 3, 1])  # 3 is no class


@pytest.fixture(scope="module")
def model() -> ScoreModel:
    torch.manual_seed(0)
    make, options = own_networks.CASES["classes"]
    return ncsn_fast.wrap(make(), **options)


def drawn(model: ScoreModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, *model.image_shape, generator=generator)
    return x, torch.rand(4, generator=generator), torch.randn(x.shape, generator=generator)


def test_labels_reach_the_network(model):
    x, uniform, noise = drawn(model)
    level, losses = Objective(model, 2.0)(x, uniform, noise, LABELS)
    sigma = model.sigmas[level]
    wide = sigma[:, None, None, None]
    residual = model.score(x + wide * noise, sigma, LABELS) + noise / wide
    expected = 0.5 * sigma**2 * residual.square().flatten(1).sum(1)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    none = Objective(model, 2.0)(x, uniform, noise)[1]
    assert torch.equal(none[2], losses[2])
    assert not torch.isclose(none, losses)[[0, 1, 3]].any()


def test_networks_without_classes_refuse_labels():
    without = tiny.model()
    with pytest.raises(ValueError, match="has no classes: leave the labels out"):
        Objective(without, 2.0)(*drawn(without), LABELS)
