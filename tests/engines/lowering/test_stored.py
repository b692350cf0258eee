"""Traced graphs that are stored: in the package for the models that ship, else in the cache."""

import copy
import functools
import json
import subprocess
import sys

import drawing
import pytest
import torch
from paths import ROOT
from torch import nn

from ncsn_fast.checkpoints.loading import load
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.lowering import export, stored
from ncsn_fast.engines.lowering.lower import lower
from ncsn_fast.engines.static_engine import conditions, lowered
from ncsn_fast.models.refinenet import RefineNet
from ncsn_fast.models.unet import TimeUNet
from tools import store_graphs


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No graph that any test or process has stored, and none that ships."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stored, "_known", {})
    monkeypatch.setattr(stored, "SHIPPED", tmp_path / "none")
    return tmp_path / "ncsn_fast" / "graphs"


def output(graph, *conditions):
    torch.manual_seed(0)
    plan = CpuPlan(graph, 2, torch.float32)
    plan.input.copy_(torch.rand(plan.input.shape))
    with torch.inference_mode():
        plan.set_conditions(*conditions)
        plan.run()
    return plan.output.clone()


def names(graph):
    return [(op.kind, op.name) for op in graph.ops]


@pytest.mark.parametrize("source", store_graphs.MODELS, ids=lambda source: source.name)
def test_the_graph_that_ships_is_what_tracing_gives(source, fresh, monkeypatch):
    of = load(source)
    key, _ = store_graphs.of(of)
    traced = lowered(of, of.config.image_size)
    monkeypatch.undo()
    monkeypatch.setattr(stored, "_known", {})
    assert (stored.SHIPPED / f"{key}.json").exists(), "run `python -m tools.store_graphs`"
    monkeypatch.setattr(export, "_export", None)
    shipped = lowered(copy.deepcopy(of), of.config.image_size)
    assert names(shipped) == names(traced)
    rows = [torch.full((2,), 0.5, dtype=dtype) for dtype in conditions(of) if dtype is not None]
    assert torch.equal(output(shipped, *rows), output(traced, *rows))


def test_nothing_else_ships():
    assert len([*stored.SHIPPED.iterdir()]) == len(store_graphs.MODELS)


@pytest.mark.slow
def test_a_model_that_ships_is_loaded_without_the_parts_of_torch_compile():
    """They take longer than the model's first picture."""
    program = (
        "import sys, ncsn_fast; from ncsn_fast.engines.static_engine import conditions, lowered; "
        "of = ncsn_fast.load('digits'); lowered(of, of.config.image_size); "
        "sys.exit(sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & {*sys.modules}) or None)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_networks_with_conditions_are_stored(fresh, monkeypatch):
    torch.manual_seed(0)
    net, times = TimeUNet("b", ngf=4).eval(), torch.tensor([0.1, 0.8])
    first = lower(net, (1, 28, 28), [torch.float32])
    (path,) = fresh.iterdir()
    assert {*json.loads(path.read_text())} == {"graph", "digest"}
    monkeypatch.setattr(stored, "_known", {})
    monkeypatch.setattr(export, "_export", None)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.tconv1.bias += 1
    again = lower(other, (1, 28, 28), [torch.float32])
    assert names(again) == names(first)
    expected = output(first, times) + 1
    assert (output(again, times) - expected).norm() <= 1e-6 * expected.norm()


def test_a_network_that_is_exported_for_one_batch_size_is_not_stored(fresh, monkeypatch):
    """torch.export takes N for the number of channels here, where both are 2."""
    nets = [drawing.tiny(arch="ncsn") for _ in range(2)]
    graphs = []
    for net in nets:
        monkeypatch.setattr(stored, "_known", {})  # as in another process
        graphs.append(lowered(net, (8, 8)))
    assert graphs[0].batch == graphs[1].batch == 2
    assert names(graphs[0]) == names(graphs[1])
    assert not list(fresh.glob("*.json"))


def test_each_architecture_has_its_graph(fresh):
    keys = {
        stored.key(net, (1, 16, 16))
        for net in (
            RefineNet("ncsnv2", channels=1, ngf=4, n_levels=2),
            RefineNet("ncsnv2", channels=1, ngf=8, n_levels=2),
            RefineNet("ncsnv2", channels=1, ngf=4, n_levels=2, act="relu"),
            RefineNet("ncsnv2", channels=1, ngf=4, n_levels=2, norm="BatchNorm"),
            RefineNet("ncsnv2", channels=1, ngf=4, n_levels=2, scale_input=False),
            TimeUNet("a", ngf=4),
            TimeUNet("b", ngf=4),
        )
    }
    assert len(keys) == 7
    assert None not in keys


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.end_conv.register_forward_hook(lambda module, inputs, y: 2 * y),
        lambda net: setattr(net.end_conv, "forward", nn.Identity().forward),
        lambda net: setattr(net, "end_conv", Foreign()),
        lambda net: setattr(net.style, "act", lambda x: 2 * x),
        lambda net: setattr(net.style, "act", functools.partial(lambda x, a: a * x, a=2)),
    ],
    ids=["hook", "forward", "foreign module", "function", "partial"],
)
def test_a_network_that_someone_changed_has_no_key(change):
    net = RefineNet("ncsnv2", channels=1, ngf=4, n_levels=2)
    assert stored.key(net, (1, 16, 16))
    change(net)
    assert stored.key(net, (1, 16, 16)) is None


class Foreign(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "target", ["os.system", "aten.no_such.default", "operator.call", "eval", "prim.device.default"]
)
def test_files_name_operations_of_graphs_only(target):
    with pytest.raises((AttributeError, KeyError, ValueError, RuntimeError)):
        stored._resolved(target)
