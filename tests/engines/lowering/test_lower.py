"""From networks to lists of operations: ours as before, others as PyTorch computes them."""

import copy
import json
import logging

import engine_cases
import golden
import networks
import pytest
import torch
import torch.nn.functional as F
from cross_section import cross_section
from torch import nn

import ncsn_fast
from ncsn_fast import ModelConfig, ScoreModel
from ncsn_fast.checkpoints.loading import load
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.lowering import export, stored
from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.lowering.lower import lower
from ncsn_fast.engines.precision import BOUNDS
from ncsn_fast.engines.static_engine import lowered
from ncsn_fast.models.layers import ACTIVATIONS, NORMS
from ncsn_fast.models.refinenet import RefineNet
from ncsn_fast.models.unet import TimeUNet

TIMES = torch.tensor([0.05, 0.4, 0.9])


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Graphs that no other test or process has stored, and none that ships."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stored, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(stored, "_known", {})
    return tmp_path / "ncsn_fast" / "graphs"


def listing(graph):
    sizes = [(op, op.outputs[0]) for op in graph.ops]
    return [f"{op.kind} {op.name} {y.channels}x{y.height}x{y.width}" for op, y in sizes]


def computed(net, shape, conditions=(), dtype=torch.float32, batch=3):
    """Returns what a plan and the network compute, and the kinds of the plan's steps.

    A plan for GPUs has to compute the same.
    """
    net.eval()
    torch.manual_seed(1)
    with torch.inference_mode():
        graph = lower(net, shape, [c.dtype for c in conditions])
        plan = CpuPlan(graph, batch, dtype)
        x = torch.rand(batch, *shape)
        plan.load(x)
        plan.set_conditions(*conditions)
        plan.run()
        found, expected = plan.output.float(), net(x, *conditions)
        on_gpus = engine_cases.fused_output(graph, x, *conditions, dtype=dtype)
    bound = 2e-6 if dtype is torch.float32 else BOUNDS["bf16"]
    assert error(on_gpus, expected) <= bound
    return found, expected, [cost.kind for cost in plan.costs]


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def in_torch(kinds):
    return [kind for kind in kinds if "torch" in kind]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["digits", "ncsnv2", "ncsnv2_deeper", "ncsn"])
def test_our_networks_are_the_lists_of_the_front_end_before(name):
    """The list was made by walking the modules of RefineNet; this one knows nothing of them."""
    of = (
        load("digits")
        if name == "digits"
        else ScoreModel(ModelConfig(arch=name, image_size=(32, 32), ngf=8, n_sigmas=4))
    )
    graph = lowered(of, of.config.image_size)
    assert listing(graph) == json.loads((golden.FOLDER / "lowered.json").read_text())[name]
    assert (graph.scale, graph.shift) == (2.0, -1.0)
    assert not graph.kept


@pytest.mark.parametrize(("act", "norm"), cross_section([*ACTIVATIONS], [*NORMS]))
def test_refinenet_of_any_style(act, norm):
    torch.manual_seed(0)
    net = RefineNet("ncsnv2", channels=3, ngf=8, n_levels=4, act=act, norm=norm)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    found, expected, kinds = computed(net, (3, 16, 16))
    assert error(found, expected) <= 2e-6
    # What has no kernel of ours: leaky ReLUs, and the variance norm of published ablations.
    expected_kinds = {"leaky_relu (torch)"} if act == "lrelu" else set()
    assert {*in_torch(kinds)} == expected_kinds | ({"torch"} if norm == "VarianceNorm" else set())


@pytest.mark.parametrize("version", ["a", "b"])
def test_the_tutorials_network(version):
    torch.manual_seed(0)
    found, expected, kinds = computed(TimeUNet(version), (1, 28, 28), (TIMES,))
    assert error(found, expected) <= 2e-6
    assert kinds.count("group_norm") == 7
    assert "depth_to_space" in kinds
    assert not in_torch(kinds)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "style", [{}, {"down": "pad"}, {"down": "pool"}, {"film": True}, {"explicit": True}], ids=str
)
def test_a_users_unet(style, dtype):
    torch.manual_seed(0)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    net = networks.UNet(**style)
    found, expected, kinds = computed(net, (3, 16, 16), (TIMES,), types[dtype])
    assert error(found, expected) <= BOUNDS[dtype]
    assert not in_torch(kinds)
    assert {"conv", "group_norm", "attention", "concat", "nearest2"} < {*kinds}


@pytest.mark.parametrize("batch", [1, 3])
def test_what_no_kernel_covers_is_run_by_pytorch(batch):
    torch.manual_seed(0)
    found, expected, kinds = computed(networks.Odd(), (4, 8, 8), batch=batch)
    assert error(found, expected) <= 2e-6
    assert "torch" in kinds
    assert {"conv", "layer_norm"} < {*kinds}


class OneSize(nn.Module):
    """A network whose graph holds the number of images, which it takes for a number of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        h = self.first(x)
        return self.last(F.mish(h.view(len(h), 2, 2, 8, 8)).flip(1).reshape(len(h), 4, 8, 8))


def test_a_network_that_is_lowered_for_every_batch_size():
    torch.manual_seed(0)
    graph = lower(OneSize(), (1, 8, 8))
    assert graph.batch == 2
    with pytest.raises(ValueError, match="lowered for 2 images; got a batch of 3"):
        CpuPlan(graph, 3, torch.float32)
    settings = {"predicts": "epsilon", "sees": "nothing", "image_shape": (1, 8, 8)}
    of = ncsn_fast.wrap(OneSize(), **settings, sigma_min=0.01, sigma_max=1)
    for n in (1, 3):
        built = CpuEngine(of, device=torch.device("cpu"), dtype="fp32", batch_size=n)
        x = torch.rand(n, 1, 8, 8)
        with torch.inference_mode():
            assert error(built.output(x, None), of.net(x)) <= 1e-6


def test_what_torch_cannot_export_is_named(capfd):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(
        UnsupportedNetwork, match=r"a forward that torch.export does not take \(\w+"
    ):
        lower(Branches(), (1, 8, 8))
    assert capfd.readouterr() == ("", "")  # where torch prints pages


def test_the_training_mode_and_the_network_stay_as_they_are():
    net = networks.UNet()
    before = copy.deepcopy(net.state_dict())
    assert net.training
    lower(net, (3, 16, 16), [torch.float32])
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_type_is_lowered_in_float32(dtype):
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.SiLU(), nn.Conv2d(2, 1, 1)).to(dtype)
    x = torch.rand(2, 1, 8, 8)
    with torch.inference_mode():
        plan = CpuPlan(lower(net, (1, 8, 8)), 2, torch.float32)
        plan.load(x)
        plan.run()
        assert error(plan.output, copy.deepcopy(net).float()(x)) <= 1e-6
    assert net[0].weight.dtype is dtype


def test_a_network_of_inference_mode():
    with torch.inference_mode():
        net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.SiLU(), nn.Conv2d(2, 1, 1))
    found, expected, kinds = computed(net, (1, 8, 8))
    assert error(found, expected) <= 1e-6
    assert kinds == ["conv", "silu", "conv"]


def test_a_changed_network_is_lowered_again():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)
    ).eval()
    first = lower(net, (1, 4, 4))
    assert lower(net, (1, 4, 4)) is first
    with torch.no_grad():
        net[1].weight.mul_(3)
    second = lower(net, (1, 4, 4))
    assert torch.allclose(second.ops[0].spec.weight, 3 * first.ops[0].spec.weight)
    for _ in range(3):  # a new parameter may have the address of one that is gone
        net[2].weight = nn.Parameter(torch.rand(1, 2, 1, 1))
        assert torch.equal(lower(net, (1, 4, 4)).ops[1].spec.weight, net[2].weight)


def test_what_depends_on_nothing_but_parameters_is_computed_once():
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.randn(2, 1, 3, 3))
            self.g = nn.Parameter(torch.rand(2, 1, 1, 1))

        def forward(self, x):
            weight = self.g * self.v / self.v.flatten(1).norm(dim=1)[:, None, None, None]
            return F.conv2d(x, weight, padding=1).sum(dim=1, keepdim=True)

    net = Weighted()
    found, expected, kinds = computed(net, (1, 8, 8))
    assert error(found, expected) <= 1e-6
    assert kinds == ["conv", "torch"]
    assert lower(net, (1, 8, 8)).kept == {"v", "g"}  # for images of other sizes, later


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_stored_graphs_are_used_if_they_are_whole(fresh, damage, monkeypatch):
    of = engine_cases.model(channels=1, norm="InstanceNorm")
    first = lowered(of, (16, 16))
    (path,) = fresh.iterdir()
    text = path.read_text()
    if damage == "cut":
        path.write_text(text[:1000])
    elif damage == "changed":
        path.write_text(text.replace("aten.elu.default", "aten.relu.default", 1))
    else:
        path.unlink()
    monkeypatch.setattr(stored, "_known", {})
    again = copy.deepcopy(of)  # another network of this architecture
    assert listing(lowered(again, (16, 16))) == listing(first)
    assert path.read_text() == text  # lowered, and written, again
    monkeypatch.setattr(stored, "_known", {})
    monkeypatch.setattr(export, "_export", None)
    third = copy.deepcopy(of)
    found = lowered(third, (16, 16))
    assert listing(found) == listing(first)
    weights = {p.data_ptr() for p in third.net.parameters()}
    assert found.ops[0].spec.weight.data_ptr() in weights


def test_a_network_that_someone_changed_is_not_stored(fresh):
    net = RefineNet("ncsnv2", channels=1, ngf=4, n_levels=2).eval()
    net.end_conv.register_forward_hook(lambda module, inputs, y: 2 * y)
    lower(net, (1, 16, 16))
    assert not fresh.exists()


def test_time_networks_run_on_the_cpu_engine(caplog):
    of = ScoreModel(
        ModelConfig(
            arch="unet_b", image_size=(28, 28), channels=1, ngf=8, act="swish", norm="GroupNorm",
            scale_input=False, n_sigmas=3, sigma_begin=9.0, sigma_min=1.0, sigma_max=25.0,
        )
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        built = CpuEngine(of, device=torch.device("cpu"), dtype="fp32", batch_size=2)
    assert built.error <= BOUNDS["fp32"]
    x, t = torch.rand(2, 1, 28, 28), torch.tensor([0.1, 0.9])
    with torch.inference_mode():
        expected = of.net.eval()(x, t)
    assert error(built.output(x, t), expected) <= 2e-6
    reference = EagerEngine(of, device=torch.device("cpu"), dtype="fp32", batch_size=2)
    program = engine_cases.program_of(of)
    runs = [each.run(program, engine_cases.chains_of(of)) for each in (built, reference)]
    assert error(*runs) <= 1e-4
    assert "group_norm" in built.describe()


@pytest.mark.parametrize("labelled", [False, True])
def test_a_wrapped_network_is_sampled_as_by_eager(labelled):
    torch.manual_seed(0)

    class Labelled(networks.UNet):
        def __init__(self) -> None:
            super().__init__(width=8)
            self.classes = nn.Embedding(4, 8)

        def forward(self, x, c, labels):
            return super().forward(x, c + self.classes(labels).mean(dim=1))

    net = Labelled() if labelled else networks.UNet(width=8)
    model = ncsn_fast.wrap(
        net, predicts="epsilon", sees="log_sigma", image_shape=(3, 16, 16), sigma_min=0.1,
        sigma_max=1, n_sigmas=3, n_steps_each=1, n_classes=3 if labelled else 0,
    )  # fmt: skip
    options = {"labels": [0, 2, 1], "guidance": 2.0} if labelled else {}
    images = {}
    for engine in ("cpu", "eager"):
        sampler = ncsn_fast.Sampler(model, engine=engine, dtype="fp32", batch_size=3)
        images[engine] = sampler.sample(3, progress=False, **options)
        assert sampler.engine_for(3).name == engine
        plain = {k: v for k, v in options.items() if k != "guidance"}
        images[engine, "plain"] = sampler.sample(3, progress=False, **plain)
    assert error(images["cpu"], images["eager"]) <= 1e-5
    assert error(images["cpu", "plain"], images["eager", "plain"]) <= 1e-5


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 2)), (2,)),
        (nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv1d(8, 3, 1)), (3, 16)),
        (nn.Conv3d(1, 1, 3, padding=1), (1, 4, 4, 4)),
    ],
    ids=["points", "signals", "volumes"],
)
def test_data_that_are_no_images(net, shape):
    model = ncsn_fast.wrap(
        net, predicts="epsilon", sees="nothing", image_shape=shape, sigma_min=0.1, sigma_max=1,
        n_sigmas=3, n_steps_each=1, data_range=None,
    )  # fmt: skip
    images = [
        ncsn_fast.Sampler(model, engine=name, dtype="fp32").sample(3, progress=False)
        for name in ("cpu", "eager")
    ]
    assert images[0].shape == (3, *shape)
    assert error(*images) <= 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_unet_of_diffusers(dtype):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x, c):
            return self.net(x, c).sample

    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    times = torch.tensor([1.0, 100.0, 900.0])
    found, expected, kinds = computed(Output(), (3, 16, 16), (times,), types[dtype])
    assert error(found, expected) <= BOUNDS[dtype]
    assert not in_torch(kinds)
    assert {"conv", "group_norm", "attention", "concat", "nearest2"} < {*kinds}
