"""Transposed convolutions: as convolutions, by a kernel of ours, or by PyTorch."""

import copy

import engine_cases
import pytest
import torch
from torch import nn

from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.lowering.lower import lower
from ncsn_fast.engines.precision import BOUNDS

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def net_of(channels, middle, **settings):
    """A network whose output has the size of its image, whatever the transposed convolution's."""

    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(channels, middle, **settings)
            self.out = nn.Conv2d(middle, channels, 1)

        def forward(self, x):
            y = self.out(self.up(x))
            return nn.functional.pad(y, (0, 40 - y.shape[3], 0, 40 - y.shape[2]))[:, :, :8, :8]

    torch.manual_seed(0)
    return Resized().eval()


CASES = {
    # What it becomes, channels, channels behind, settings.
    "doubling": ("depth_to_space", 3, 5, {"kernel_size": 4, "stride": 2, "padding": 1}),
    "squares": ("depth_to_space", 4, 4, {"kernel_size": 2, "stride": 2, "bias": False}),
    "odd": ("depth_to_space", 3, 4, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "even by output padding": (
        "depth_to_space", 3, 4, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    ),
    "threefold": ("depth_to_space", 2, 3, {"kernel_size": 5, "stride": 3, "padding": 2}),
    "cut": ("depth_to_space", 2, 3, {"kernel_size": 4, "stride": 2, "padding": 3}),
    "stride 1": ("conv", 3, 4, {"kernel_size": 3, "padding": 1}),
    "holes": ("conv", 3, 4, {"kernel_size": 3, "dilation": 2, "padding": 1}),
    "a filter": (
        "conv_transpose", 6, 6,
        {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 6, "bias": False},
    ),
    "a filter and a bias": (
        "conv_transpose", 37, 37,
        {"kernel_size": 3, "stride": 2, "padding": 0, "output_padding": 1, "groups": 37},
    ),
    "a filter of stride 1": ("conv_transpose", 4, 4, {"kernel_size": 5, "groups": 4}),
    "groups": ("conv_transpose (torch)", 4, 4, {"kernel_size": 3, "stride": 2, "groups": 2}),
    "holes between strides": (
        "conv_transpose (torch)", 4, 4, {"kernel_size": 3, "stride": 2, "dilation": 2},
    ),
    "a row of zeros behind": (
        "depth_to_space", 4, 4, {"kernel_size": 3, "stride": 2, "output_padding": 1},
    ),
    "nothing but bias behind": (
        "depth_to_space", 4, 4, {"kernel_size": 2, "stride": 2, "output_padding": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_transposed_convolutions(case):
    kind, channels, middle, settings = CASES[case]
    net = net_of(channels, middle, **settings)
    x = torch.rand(2, channels, 8, 8)
    with torch.inference_mode():
        expected = copy.deepcopy(net).double()(x.double())
        for dtype in engine_cases.TYPES:
            plan = CpuPlan(lower(net, (channels, 8, 8)), 2, TYPES[dtype])
            plan.load(x)
            plan.run()
            found = plan.output.double()
            assert (found - expected).norm() <= BOUNDS[dtype] * expected.norm()
    kinds = [cost.kind for cost in plan.costs]
    others = {"conv", "pad (torch)", "torch", "copy (torch)"}
    assert kinds[:1] == ["conv"] if kind == "depth_to_space" else kinds[:1] == [kind]
    assert {*kinds} - others <= {kind}
    assert kind in kinds
