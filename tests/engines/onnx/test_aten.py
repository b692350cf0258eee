"""Networks that users bring, as ONNX: every operation of the table, and whole models."""

import numpy as np
import onnx
import onnxruntime
import own_networks
import pytest
import torch
import torch.nn.functional as F
from cross_section import SLOW, cross_section
from torch import nn

import ncsn_fast
from ncsn_fast import EngineError, EngineUnavailable, Sampler
from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.onnx import aten
from ncsn_fast.engines.onnx import model as onnx_model
from ncsn_fast.engines.onnx.engine import OrtEngine
from ncsn_fast.engines.onnx.model import make_onnx
from ncsn_fast.engines.onnx.writer import Value, Writer
from ncsn_fast.engines.reference_check import exported_condition
from ncsn_fast.ops import instance_norm_plus


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        torch.manual_seed(5)
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3) / 6)
        self.vector, self.square = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(6, 6))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("variance", torch.rand(4) + 0.5)

    def forward(self, x, c):
        return self.function(self, x, c)


def session(module, inputs, dtype=torch.float32):
    """An ONNX Runtime session of a module's graph, without the model around it."""
    exported, w = aten.export(module, inputs), Writer(dtype)
    names = [f"in{i}" for i in range(len(inputs))]
    values = [Value(name, x.dtype) for name, x in zip(names, inputs, strict=True)]
    w.op("Cast", aten.translate(exported, w, values), name="f", to=torch.float32)
    kinds = {k: getattr(onnx.TensorProto, v) for k, v in onnx_model._KINDS.items()}
    infos = [
        onnx.helper.make_tensor_value_info(name, kinds[x.dtype], ["n", *x.shape[1:]])
        for name, x in zip(names, inputs, strict=True)
    ]
    nodes = [
        onnx.helper.make_node(
            node.kind, node.inputs, node.outputs,
            **{k: kinds.get(v, v) if isinstance(v, torch.dtype) else v
               for k, v in node.attributes.items()},
        )
        for node in w.nodes
    ]  # fmt: skip
    weights = [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in w.constants.items()]
    output = onnx.helper.make_tensor_value_info(
        "f", kinds[torch.float32], [None] * exported.output.meta["val"].ndim
    )
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "test", infos, [output], weights),
        opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9,
    )  # fmt: skip
    onnx.checker.check_model(proto, full_check=True)
    run = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda *given: torch.from_numpy(
        run.run(None, {n: g.numpy() for n, g in zip(names, given, strict=True)})[0]
    )


OPERATIONS = {
    "convolution": lambda m, x, c: F.conv2d(x, m.weight, stride=2, padding=1),
    "dilated": lambda m, x, c: F.conv2d(x, m.weight, padding=2, dilation=2),
    "same": lambda m, x, c: F.conv2d(x, m.weight, padding="same"),
    "groups": lambda m, x, c: F.conv2d(x, m.weight[:4, :1], m.vector, padding=1, groups=4),
    "transposed": lambda m, x, c: F.conv_transpose2d(x, m.weight[:4], stride=2, padding=1,
                                                     output_padding=1),
    "signal": lambda m, x, c: F.conv1d(x.flatten(2), m.weight[:, :, 0], padding=1),
    "volume": lambda m, x, c: F.conv3d(x[:, :, None], m.weight[:, :, None], padding=(0, 1, 1)),
    "linear": lambda m, x, c: F.linear(x, m.square, m.square[0]),
    "products": lambda m, x, c: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2].mT, beta=0.5, alpha=2.0),
    "attention": lambda m, x, c: F.scaled_dot_product_attention(x, x + 1, x * 2),
    "scaled attention": lambda m, x, c: F.scaled_dot_product_attention(x, x, x, scale=0.3),
    "group norm": lambda m, x, c: F.group_norm(x, 2, m.vector, m.vector),
    "layer norm": lambda m, x, c: F.layer_norm(x, [6], m.square[0], m.square[1]),
    "instance norm": lambda m, x, c: F.instance_norm(x, weight=m.vector, bias=m.vector),
    "batch norm": lambda m, x, c: F.batch_norm(x, m.mean, m.variance, m.vector, m.vector),
    "IN++": lambda m, x, c: instance_norm_plus(x, m.vector, m.vector, m.vector, elu=True),
    "activations": lambda m, x, c: F.silu(x) + F.elu(x, 0.5) + F.relu(x) + F.leaky_relu(x, 0.1)
    + F.gelu(x) + F.gelu(x, approximate="tanh") + torch.tanh(x) + torch.sigmoid(x) + F.mish(x)
    + F.softplus(x),
    "arithmetic": lambda m, x, c: (1 - x) / 2 + 3 * x - torch.sub(x, x, alpha=2) + -x + x**2
    + x.abs().sqrt() + (x.abs() + 1).rsqrt() + x.square() + x.exp() * x.clamp(-0.5, 0.5),
    "functions": lambda m, x, c: torch.log1p(x.abs()) + torch.expm1(x) + x.sin() + x.cos()
    + (x.abs() + 1).log() + torch.maximum(x, m.vector[:, None, None]) + x.clamp(min=0),
    "comparisons": lambda m, x, c: torch.where(x > 0.1, x, 2 * x) + (x >= 0).sum(1, keepdim=True),
    "shapes": lambda m, x, c: x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2).reshape(
        x.shape[0], 2, 2, -1).unsqueeze(2).squeeze(2),
    "parts": lambda m, x, c: torch.cat([*x.chunk(2, 1), x[:, 1:3], x.split([1, 3], 1)[1],
                                        torch.stack(x.unbind(1), 1), x[:, 2][:, None]], 1),
    "expansion": lambda m, x, c: x.mean((2, 3), keepdim=True).expand_as(x)
    + x.amax(1, keepdim=True),
    "tiles": lambda m, x, c: x.repeat(1, 2, 1, 1) + m.vector.repeat(2)[:, None, None],
    "pools": lambda m, x, c: F.avg_pool2d(x, 2) + F.max_pool2d(x, 2)
    + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False) + F.max_pool2d(x, 3, 2, 1),
    "adaptive": lambda m, x, c: F.adaptive_avg_pool2d(x, 1) + F.adaptive_avg_pool2d(x, (2, 3)).sum(
        (2, 3), keepdim=True),
    "nearest": lambda m, x, c: F.interpolate(x, scale_factor=2, mode="nearest"),
    "bilinear": lambda m, x, c: F.interpolate(x, size=(7, 9), mode="bilinear"),
    "aligned": lambda m, x, c: F.interpolate(x, size=(7, 9), mode="bilinear", align_corners=True),
    "padding": lambda m, x, c: F.pad(x, (1, 2, 0, 1), value=0.5)
    + F.pad(F.pad(x, (1, 2, 0, 0), mode="reflect"), (0, 0, 0, 1), mode="replicate"),
    "embedding": lambda m, x, c: x + F.embedding(c, m.square)[:, :4, None, None],
    "condition": lambda m, x, c: x * torch.ones(x.shape[0])[:, None, None, None]
    + (c.float() * torch.arange(1.0, 3.0)[:, None]).mean(0)[:, None, None, None],
    "decomposed activations": lambda m, x, c: F.hardswish(x) + F.hardsigmoid(x) + F.selu(x)
    + F.celu(x, 0.5) + F.logsigmoid(x) + F.prelu(x, m.vector) + F.prelu(x, m.mean[:1])
    + torch.sign(x) + F.glu(x.repeat(1, 2, 1, 1), 1),
    "shuffled pixels": lambda m, x, c: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "RMS norm": lambda m, x, c: F.rms_norm(x, [6], m.square[0], 1e-3) + F.rms_norm(x, [6, 6]),
    "norms without parameters": lambda m, x, c: F.batch_norm(x, m.mean, m.variance)
    + F.instance_norm(x, m.mean, m.variance, m.vector, m.vector, use_input_stats=False),
    "batch norm in place": lambda m, x, c: F.batch_norm(
        (x + 1).mul_(2), m.mean, m.variance, m.vector, m.vector),
    "masked attention": lambda m, x, c: F.scaled_dot_product_attention(x, x, x, m.square)
    + F.scaled_dot_product_attention(x, x, x, m.square.relu() > -1)
    + F.scaled_dot_product_attention(x, x[:, :, :4], x[:, :, :4], is_causal=True)
    + F.scaled_dot_product_attention(x, x, x, torch.eye(6, dtype=torch.bool)),
    "bicubic": lambda m, x, c: F.interpolate(x, size=(9, 12), mode="bicubic"),
    "dropout and copies": lambda m, x, c: F.dropout(x, 0.5, training=False).clone().contiguous(),
}  # fmt: skip


def given(n=3):
    x = torch.randn(n, 4, 6, 6, generator=torch.Generator().manual_seed(n))
    return x, torch.arange(n) % 6


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_torchs(name):
    """In a graph whose number of images is open."""
    module = Function(OPERATIONS[name]).eval()
    run = session(module, given(2))
    for n in (1, 3):
        expected = module(*given(n)).detach()
        torch.testing.assert_close(run(*given(n)), expected, rtol=2e-5, atol=2e-5)


def test_an_operation_without_a_translation_is_named():
    for function, name in (
        (lambda m, x, c: x.cumsum(dim=1), "cumsum"),
        (lambda m, x, c: torch.fft.irfft2(torch.fft.rfft2(F.hardswish(x))), "_fft_r2c"),
    ):
        with pytest.raises(UnsupportedNetwork, match=f"the operation {name}, which has no ONNX"):
            session(Function(function), given(2))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[SLOW] * (n == "diffusers")) for n in own_networks.CASES]
)
def test_models_are_sigma_times_the_score(name):
    """Inputs are x and sigma: no time, scale or coefficient is left to the file's reader."""
    of = own_networks.model(name)
    proto = onnx.load_from_string(make_onnx(of))
    meta = {entry.key: entry.value for entry in proto.metadata_props}
    assert (meta["score"], meta["conditioning"]) == ("f * 1 / sigma", "sigma")
    run = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    sigma = of.sigmas[[0, 2, -1]]
    x = torch.rand(3, *of.image_shape) + sigma.view(-1, 1, 1, 1)
    labels = torch.tensor([0, 2, of.n_classes]) if of.n_classes else None
    named = {"x": x, "sigma": exported_condition(of, sigma), "labels": labels}
    feeds = {k: v.numpy() for k, v in named.items() if v is not None}
    with torch.no_grad():
        expected = sigma.view(-1, 1, 1, 1) * of.score(x, sigma, labels)
    np.testing.assert_allclose(run.run(None, feeds)[0], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "method"), cross_section([*own_networks.CASES], ["fast", "ald", "pc"])
)
def test_samples_are_eagers(name, method):
    of = own_networks.model(name)
    options = {"method": method, "progress": False, "labels": [0, 1, 2] if of.n_classes else None}
    eager, ort = (Sampler(of, engine=e, device="cpu") for e in ("eager", "ort"))
    expected = eager.sample(3, **options)
    torch.testing.assert_close(ort.sample(3, **options), expected, rtol=0, atol=2e-3)
    x = expected[:2]
    torch.testing.assert_close(ort.score(x, 0.3), eager.score(x, 0.3), rtol=1e-3, atol=1e-4)
    if of.n_classes:
        more = {**options, "guidance": 1.5}
        torch.testing.assert_close(
            ort.sample(3, **more), eager.sample(3, **more), rtol=0, atol=2e-3
        )


def test_half_precision_and_files(tmp_path):
    of, path = own_networks.model("unet"), tmp_path / "unet.onnx"
    half = Sampler(of, engine="ort", device="cpu", dtype="fp16")
    expected = Sampler(of, engine="eager").sample(2, method="fast", progress=False)
    found = half.sample(2, method="fast", progress=False)
    assert 0 < (found - expected).abs().max() < 0.05
    done = ncsn_fast.export_onnx(of, path)
    assert done.error < 1e-5
    from_file = Sampler(of, engine="ort", device="cpu", onnx=path)
    torch.testing.assert_close(
        from_file.sample(2, method="fast", progress=False), expected, rtol=0, atol=2e-3
    )
    other = ncsn_fast.wrap(own_networks.UNet(), **own_networks.CASES["unet"][1])
    with pytest.raises(EngineError, match="holds another model"):
        Sampler(other, engine="ort", device="cpu", onnx=path).sample(1, progress=False)
    with pytest.raises(ValueError, match=r"this network takes samples of shape \(1, 8, 12\)"):
        make_onnx(of, size=(16, 16))


class FixesTheBatch(nn.Module):
    """len(x) is a number to torch.export, where x.shape[0] stays open."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x * 0.5 + 0.1).reshape(len(x), 4, -1).mean(1).reshape(len(x), 1, 8, 8)


def test_a_forward_that_fixes_the_number_of_images(monkeypatch):
    """Our engine lowers it for every micro-batch; a file cannot hold it, which is said at once."""
    options = {"predicts": "epsilon", "image_shape": (1, 8, 8), "sigma_min": 0.1, "sigma_max": 3.0}
    torch.manual_seed(0)
    of = ncsn_fast.wrap(FixesTheBatch(), n_sigmas=4, **options)
    eager, cpu = Sampler(of, engine="eager"), Sampler(of, engine="cpu", dtype="fp32")
    for n in (1, 3, 2):
        expected = eager.sample(n, method="fast", progress=False)
        found = cpu.sample(n, method="fast", progress=False)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    message = r"'ort' does not run .* len\(x\) .*use engine='eager'"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match=message):
        Sampler(of, engine="ort", device="cpu")
    # With a GPU a graph may be written for each number of images, so that this is known later.
    monkeypatch.setattr(OrtEngine, "refuses", lambda model: None)
    with pytest.raises(EngineUnavailable, match=message):
        Sampler(of, engine="ort", device="cpu").sample(1, progress=False)
