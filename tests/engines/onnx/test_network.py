"""ONNX graphs of our own networks: conditions that are computed inside, and graphs kept on disk."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import model

from ncsn_fast.engines.lowering import stored
from ncsn_fast.engines.onnx import network
from ncsn_fast.engines.onnx.model import make_onnx


def inner(of, kind, sigma):
    """What the graph's only operator of a kind gives at noise levels."""
    proto = onnx.load_from_string(make_onnx(of))
    (name,) = (node.output[0] for node in proto.graph.node if node.op_type == kind)
    proto.graph.output.add(name=name)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.zeros((len(sigma), *of.image_shape), np.float32)
    (found,) = session.run([name], {"x": x, "sigma": sigma.numpy()})
    return found


@pytest.mark.parametrize("arch", ["unet_a", "unet_b"])
def test_the_graph_computes_the_time_of_a_noise_level(arch):
    """As exactly as float32 can, from far below the ladder's end to above its beginning."""
    of, sigma = model(arch), torch.logspace(-4, 3, 200)
    found = inner(of, "Min", sigma)
    np.testing.assert_allclose(found, of.clock.time(sigma).numpy(), rtol=5e-7)


@pytest.mark.parametrize("n_sigmas", [1, 4, 200])
def test_the_graph_computes_the_level_of_a_noise_level(n_sigmas):
    """The trained one nearest in log sigma, as the model's; below, above and between them."""
    of = model("ncsn", n_sigmas=n_sigmas)
    between = torch.logspace(-4, 3, 200)
    middle = (of.sigmas[1:] * of.sigmas[:-1]).sqrt()
    sigma = torch.cat([of.sigmas, between, middle * (1 + 1e-5), middle * (1 - 1e-5)])
    assert np.array_equal(inner(of, "ArgMin", sigma), of.nearest_level(sigma).numpy())


def test_graphs_are_kept_without_weights(monkeypatch, tmp_path):
    """A second process reads the graph; damaged files, and networks with hooks, are exported."""
    first, second = model("ncsn"), model("ncsn", seed=1)
    expected = make_onnx(first), make_onnx(second)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stored, "_known", {})
    assert make_onnx(first) == expected[0]
    (file,) = (tmp_path / "ncsn_fast" / "graphs").iterdir()
    content = file.read_text()
    exported = []
    monkeypatch.setattr(network, "_of_any_size", lambda of: exported.append(of) or 1 / 0)
    monkeypatch.setattr(stored, "_known", {})
    assert make_onnx(second) == expected[1]
    assert not exported
    for damaged in ("", content[:-9], content.replace("ArgMin", "ArgMax")):
        file.write_text(damaged)
        monkeypatch.setattr(stored, "_known", {})
        with pytest.raises(ZeroDivisionError):
            make_onnx(second)
    file.write_text(content)
    second.net.begin_conv.register_forward_hook(lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        make_onnx(second)
