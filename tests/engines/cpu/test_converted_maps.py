"""bfloat16 maps where oneDNN has no bfloat16: its convolutions then get copies in float32."""

import own_networks
import pytest
import torch
import torch.nn.functional as F
from engine_cases import CPU, model
from torch import nn

from ncsn_fast import Sampler, ScoreModel
from ncsn_fast.engines.cpu import autotune, onednn
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.lowering.graph import ConvolutionSpec, Graph
from ncsn_fast.engines.lowering.lower import lower
from ncsn_fast.engines.precision import BOUNDS


@pytest.fixture(autouse=True)
def without_bfloat16(tmp_path, monkeypatch):
    """As on x86-64 without AVX-512, where packing a bfloat16 weight raises."""
    pack = onednn.pack
    onednn.lacks(torch.float32)  # oneDNN reads its limits when it is first used

    def without(of, shape, dtype):
        if dtype is torch.bfloat16:
            raise RuntimeError("bf16 path needs avx512bw\nand a backtrace")
        return pack(of, shape, dtype)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onednn, "pack", without)
    onednn.lacks.cache_clear()
    yield
    onednn.lacks.cache_clear()


def test_why_names_the_limit(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert onednn.lacks(torch.float32) is None
    assert onednn.lacks(torch.bfloat16) == (
        "oneDNN has no bfloat16 convolutions for this processor (bf16 path needs avx512bw; "
        "the environment sets ONEDNN_MAX_CPU_ISA=AVX2)"
    )


def test_the_choice_is_between_all_types(monkeypatch):
    monkeypatch.setattr(autotune, "_ROUNDS", 1)
    assert list(autotune.fastest().speed) == [
        "fp32 direct", "fp32 winograd", "bf16 direct", "bf16 winograd",
    ]  # fmt: skip
    sampler = Sampler(model(), device="cpu", batch_size=2)
    assert sampler.engine_class is CpuEngine
    assert sampler.sample(1, method="cas", progress=False).isfinite().all()


CONVOLUTIONS = {
    "stride": ((8, 5, 3), {"padding": 1, "stride": 2}),
    "groups": ((4, 6, 3), {"padding": 1, "groups": 2}),
    "dilation": ((5, 7, 3), {"padding": 4, "dilation": 4}),
    "pointwise": ((5, 7, 1), {"padding": 0}),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_rounds_its_sum_once(case, bias):
    (inputs, outputs, taps), settings = CONVOLUTIONS[case]
    generator = torch.Generator().manual_seed(0)
    fan_in = inputs // settings.get("groups", 1)
    weight = torch.randn(outputs, fan_in, taps, taps, generator=generator)
    shift = torch.randn(outputs, generator=generator) if bias else None
    graph = Graph(inputs, 12, 10)
    graph.output = graph.conv("conv", graph.input, ConvolutionSpec(weight, shift, **settings))
    plan = CpuPlan(graph, 3, torch.bfloat16, products=True)
    x = torch.randn(3, inputs, 12, 10, generator=generator).bfloat16()
    plan.load(x)
    for _ in range(2):  # nothing of the first run is left in the second
        plan.run()
        expected = F.conv2d(x.double(), weight.double(), None if shift is None else shift.double(),
                            **settings)  # fmt: skip
        # Half of a bfloat16's spacing, and float32's own rounding of sums that cancel.
        limit = 2**-8 * expected.abs() + 1e-5
        assert ((plan.output.double() - expected).abs() <= limit).all()


class Parts(nn.Module):
    """Products that are no attention, a transposed convolution that PyTorch runs, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 32, 3, padding=1)
        self.first, self.second = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))
        self.down = nn.Conv2d(32, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1, groups=2)
        self.leave = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.enter(x)
        x = x + self.second(F.elu(self.first(F.elu(x))))
        q = self.down(x).flatten(2)
        context = torch.einsum("ndk,nek->nde", q, q) / q.shape[2]
        y = torch.einsum("nde,ndk->nek", context, q).unflatten(2, (x.shape[2] // 2, -1))
        return self.leave(self.up(y))


def test_what_else_multiplies_maps_computes_in_float32():
    torch.manual_seed(0)
    net = Parts().eval().requires_grad_(False)
    graph = lower(net, (3, 16, 16))
    plan = CpuPlan(graph, 2, torch.bfloat16, products=True, winograd=True)
    kinds = {cost.kind for cost in plan.costs}
    assert {"winograd", "product (torch)", "conv_transpose (torch)"} <= kinds
    x = torch.rand(2, 3, 16, 16)
    plan.load(x)
    plan.run()
    expected = net(x)
    error = (plan.output.float() - expected).norm() / expected.norm()
    assert 1e-3 < error <= BOUNDS["bf16"]
    assert all(t.dtype is not torch.bfloat16 for ts in plan.weights.values() for t in ts)


@pytest.mark.parametrize("name", ["ncsnv2", "own"])
def test_networks_are_within_the_bound_of_bfloat16(name):
    of: ScoreModel = own_networks.model("edm") if name == "own" else model(ngf=32)
    x = torch.rand(2, *of.image_shape)
    condition = None if of.conditioning == "none" else of.condition(of.sigmas[:1]).expand(2)
    for convolutions in ("direct", "winograd"):
        built = CpuEngine(of, device=CPU, dtype="bf16", batch_size=2, convolutions=convolutions)
        assert 1e-3 < built.error <= BOUNDS["bf16"]
        f, smaller = built.output(x, condition), built.resized(1)
        assert smaller._weights is built._weights
        again = smaller.output(x[:1], None if condition is None else condition[:1])
        # oneDNN may add up in another order for another batch.
        assert (f[:1] - again).norm() <= BOUNDS["bf16"] * f[:1].norm()
