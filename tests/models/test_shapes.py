"""Models without memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ncsn_fast.models.inception import FIDInception
from ncsn_fast.models.score import ModelConfig, ScoreModel
from ncsn_fast.models.shapes import shapes_only

BUILDERS = {
    "ncsnv2": lambda: ScoreModel(ModelConfig(arch="ncsnv2", image_size=(16, 16), ngf=4)),
    "ncsn": lambda: ScoreModel(ModelConfig(arch="ncsn", image_size=(16, 16), ngf=4)),
    "inception": FIDInception,
    "initialised by name": lambda: nn.init.normal_(tensor=nn.Parameter(torch.empty(2, 3))),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_shapes_are_those_of_the_model(name):
    with shapes_only():
        bare = BUILDERS[name]()
    whole = BUILDERS[name]()
    if isinstance(whole, nn.Parameter):
        assert (bare.shape, bare.device.type) == (whole.shape, "meta")
        return
    expected = {key: value.shape for key, value in whole.state_dict().items()}
    assert {key: value.shape for key, value in bare.state_dict().items()} == expected
    assert all(p.is_meta for p in bare.parameters())


def test_what_is_no_initialisation_runs():
    with shapes_only():
        y = F.conv2d(torch.rand(1, 2, 4, 4), torch.rand(3, 2, 3, 3))
    assert y.is_meta
    assert y.shape == (1, 3, 2, 2)
    assert not torch.rand(2).is_meta
