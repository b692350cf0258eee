"""The U-Nets of score_sde and EDM on every engine of the CPU, against eager."""

import onnx
import pytest
import unets

from ncsn_fast import Sampler
from ncsn_fast.engines.onnx.model import make_onnx
from ncsn_fast.engines.static_engine import lowered

# One network with FIR filters and residual inputs, and one with classes and adaptive norms.
FEW = ("ncsnpp", "edm-adm")
slow = pytest.mark.slow


def named(names, always=FEW):
    """Returns names, of which all but a few are slow."""
    return [name if name in always else pytest.param(name, marks=slow) for name in names]


def check(name, engine, bound):
    """Samples of two steps of Euler's method, with a class and guidance where there are classes."""
    model = unets.model(name)
    options = {"method": "euler", "steps": 2, "sigma_start": 2.0, "progress": False, "seed": 3}
    if model.n_classes:
        options |= {"labels": 1, "guidance": 2.0}
    expected = Sampler(model, engine="eager", batch_size=2).sample(2, **options)
    found = Sampler(model, engine=engine, dtype="fp32", batch_size=2).sample(2, **options)
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < bound


@pytest.mark.parametrize("name", named(unets.TINY, FEW[:1]))
def test_cpu(name):
    check(name, "cpu", 1e-3)


@pytest.mark.parametrize("name", named(unets.TINY))
def test_every_operation_has_a_kernel(name):
    """PyTorch runs nothing inside the plans of the engines cpu and cuda."""
    graph = lowered(unets.model(name), (8, 8))
    assert "torch" not in {op.kind for op in graph.ops}


@pytest.mark.parametrize("name", named(unets.TINY, ("edm-ddpmpp",)))
def test_ort(name):
    check(name, "ort", 1e-3)


@pytest.mark.parametrize("wide", [True, False])
def test_only_wide_graphs_compute_the_time_in_float64(wide):
    """TensorRT, which takes the others, has no such type."""
    proto = onnx.ModelProto.FromString(make_onnx(unets.model("ddpmpp"), wide=wide))
    casts = {a.i for node in proto.graph.node for a in node.attribute if a.name == "to"}
    stored = {tensor.data_type for tensor in proto.graph.initializer}
    assert (onnx.TensorProto.DOUBLE in casts | stored) == wide


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_compile(name):
    check(name, "compile", 1e-3)
