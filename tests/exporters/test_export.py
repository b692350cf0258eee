"""ONNX files: what is in them, that they compute the network, and what is refused."""

import json
import math
import re

import golden
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from architectures import ARCHS, TIME, model
from onnx.reference import ReferenceEvaluator

import ncsn_fast
from ncsn_fast import EngineError, EngineUnavailable, __main__, export, export_onnx, ops
from ncsn_fast.cli.command import UsageError
from ncsn_fast.engines.onnx import model as onnx_model
from ncsn_fast.engines.onnx.engine import OrtEngine
from ncsn_fast.engines.onnx.model import make_onnx, read_onnx
from ncsn_fast.engines.reference_check import exported_condition

FP32, HALF = 5e-6, {"fp16": 5e-3, "bf16": 4e-2}  # relative errors of f; half: twice the measured
ELEMENT = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}


def noisy(of, n=2, size=None, seed=0):
    """Images with noise over the ladder, and what the network sees of its level."""
    generator = torch.Generator().manual_seed(seed)
    sigma = of.sigmas[torch.linspace(0, len(of.sigmas) - 1, n).long()]
    shape = n, of.config.channels, *(size or of.config.image_size)
    z = torch.randn(shape, generator=generator)
    return torch.rand(shape, generator=generator) + sigma[:, None, None, None] * z, sigma


def feeds(of, x, sigma):
    condition = exported_condition(of, sigma)
    return {"x": x.numpy(), **({} if condition is None else {"sigma": condition.numpy()})}


def ort(content):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda named: torch.from_numpy(session.run(None, named)[0])


def error(of, f, x, sigma):
    """Relative error of f against PyTorch, the largest of all images."""
    with torch.no_grad(), ops.backend("reference"):
        expected = of(x, of.condition(sigma)).flatten(1)
    assert f.dtype is torch.float32
    assert f.shape == x.shape
    return ((f.flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize("arch", ARCHS)
def test_batches_and_sizes_stay_open(arch):
    of = model(arch)
    run = ort(make_onnx(of))
    other = (44, 28) if arch in TIME else (32, 8)
    for n, size in ((1, of.config.image_size), (3, of.config.image_size), (2, other)):
        x, sigma = noisy(of, n, size)
        assert error(of, run(feeds(of, x, sigma)), x, sigma) < FP32


@pytest.mark.parametrize("fields", [{}, {"arch": "ncsn_deeper"}, {"norm": "VarianceNorm"}])
def test_fixed_shapes_are_constants(fields):
    """CUDA graphs of ONNX Runtime take no node that runs on the CPU, as those of shapes do."""
    of = model(**fields)
    x, sigma = noisy(of, 3, (32, 8))
    settings = ({"batch": 3, "size": (32, 8)}, {"batch": 3}, {"size": (32, 8)})
    for fixed in settings:
        content = make_onnx(of, **fixed)
        kinds = {node.op_type for node in onnx.load_from_string(content).graph.node}
        assert "Resize" in kinds
        open_sizes = of.config.norm == "VarianceNorm" and "size" not in fixed
        assert open_sizes == bool(kinds & {"Shape", "ReduceProd"})
        assert error(of, ort(content)(feeds(of, x, sigma)), x, sigma) < FP32


@pytest.mark.parametrize(
    ("norm", "act", "scale_input"),
    [
        ("InstanceNorm", "relu", False),
        ("VarianceNorm", "elu", True),
        ("BatchNorm", "lrelu", True),
        ("NoneNorm", "swish", False),
    ],
)
def test_norms_and_activations(norm, act, scale_input):
    of = model(norm=norm, act=act, scale_input=scale_input)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in of.net.named_buffers():  # running statistics of a batch norm
        if buffer.is_floating_point():
            offset = 0.5 if name.endswith("var") else -0.1
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + offset)
    of.train()  # the file has the inference form all the same
    content = make_onnx(of)
    assert of.training
    of.eval()
    x, sigma = noisy(of)
    assert error(of, ort(content)(feeds(of, x, sigma)), x, sigma) < FP32


def test_statistics_survive_a_large_mean():
    """Also with one channel, whose mean has no spread."""
    of = model(ngf=1)
    with torch.no_grad(), ops.backend("reference"):
        of.net.begin_conv.bias.add_(300.0)
        x, _ = noisy(of)
        f = ort(make_onnx(of))({"x": x.numpy()})
        eager = of(x)
        exact = of.double()(x.double())
    assert (f - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize(
    "name",
    [
        "ncsn_32", "ncsnv2_28_gray", "ncsnv2_32",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("ncsn_deeper_32", "ncsnv2_deeper_32", "ncsnv2_deepest_64")
        ),
    ],
)  # fmt: skip
def test_golden_outputs(name):
    meta, arrays = golden.read(name)
    of, size = golden.model(meta), meta["image_size"]
    x = golden.uniform(meta["input_seed"], meta["batch"], meta["channels"], size, size)
    sigma = of.sigmas[torch.from_numpy(arrays["labels"])]
    f = ort(make_onnx(of))(feeds(of, x, sigma))
    if not of.conditional:
        f = f / sigma[:, None, None, None]
    golden.assert_matches(f, arrays["output"])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn", "unet_b"])
def test_low_precision(arch, dtype):
    """In the reference implementation of ONNX, which rounds after every operator."""
    of = model(arch, **({} if arch == "unet_b" else {"image_size": (8, 8)}))
    content = make_onnx(of, dtype=dtype)
    x, sigma = noisy(of, 1)
    with np.errstate(over="ignore"):
        (f,) = ReferenceEvaluator(onnx.load_from_string(content)).run(None, feeds(of, x, sigma))
    found = error(of, torch.from_numpy(f), x, sigma)
    assert 1e-5 < found < HALF[dtype]


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn_deeper"])
def test_half_on_a_cpu_is_float32_with_rounded_weights(arch):
    of = model(arch)
    run = ort(make_onnx(of, dtype="fp16"))
    with torch.no_grad():
        for module in of.modules():
            if isinstance(module, torch.nn.Conv2d):
                for weight in module.parameters():
                    weight.copy_(weight.half())
    x, sigma = noisy(of)
    assert error(of, run(feeds(of, x, sigma)), x, sigma) < FP32


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("arch", ["ncsnv2_deeper", "ncsn", "unet_a"])
def test_types_inside(arch, dtype):
    of = model(arch)
    proto = onnx.load_from_string(make_onnx(of, dtype=dtype))
    onnx.checker.check_model(proto, full_check=True)
    low = getattr(onnx.TensorProto, ELEMENT[dtype])
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
    operators = "Conv", "ConvTranspose", "MaxPool", "AveragePool", "Resize", "Sqrt", "Gemm"
    kinds = {kind: set() for kind in operators}
    for node in graph.node:
        assert node.domain == ""
        if node.op_type in kinds:
            kinds[node.op_type].add(types[node.input[0]])
    assert kinds["Conv"] == {low}
    assert kinds["MaxPool"] | kinds["AveragePool"] <= {low}
    transposed = onnx.TensorProto.FLOAT if dtype == "bf16" else low  # TensorRT has no other
    assert kinds["ConvTranspose"] == ({transposed} if arch in TIME else set())
    assert kinds["Sqrt"] == {onnx.TensorProto.FLOAT}
    assert kinds["Resize"] | kinds["Gemm"] == {onnx.TensorProto.FLOAT}
    assert {v.type.tensor_type.elem_type for v in graph.output} == {onnx.TensorProto.FLOAT}
    assert types["x"] == onnx.TensorProto.FLOAT
    if dtype == "fp32":
        casts = [n for n in graph.node if n.op_type == "Cast" and n.output[0] != "f"]
        assert not casts


def test_weights_have_the_state_dicts_names():
    for arch in ARCHS:
        of = model(arch)
        proto = onnx.load_from_string(make_onnx(of))
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        weights = {key: v for key, v in of.state_dict().items() if key != "sigmas"}
        assert set(weights) == {name for name in stored if not name.startswith("constants/")}
        assert all(np.array_equal(stored[key], value) for key, value in weights.items())


def test_meta_data_and_interface():
    of = model("ncsn")
    proto = onnx.load_from_string(make_onnx(of, batch=3))
    meta = {entry.key: entry.value for entry in proto.metadata_props}
    assert meta["model"] == of.digest()
    assert json.loads(meta["config"]) == of.config.to_dict()
    assert torch.equal(torch.tensor(json.loads(meta["sigmas"])), of.sigmas)
    assert (meta["data_range"], meta["dtype"], meta["score"]) == ("[0, 1]", "fp32", "f * 1")
    assert (meta["torch"], meta["onnx"]) == (torch.__version__, onnx.__version__)
    assert [(value.name, dimensions(value)) for value in proto.graph.input] == [
        ("x", [3, 1, "height", "width"]), ("sigma", [3]),
    ]  # fmt: skip
    assert [dimensions(value) for value in proto.graph.output] == [[3, 1, "height", "width"]]
    assert make_onnx(of, batch=3) == proto.SerializeToString(deterministic=True)
    time = onnx.load_from_string(make_onnx(model("unet_a"), size=(36, 28)))
    assert [(value.name, dimensions(value)) for value in time.graph.input] == [
        ("x", ["batch", 1, 36, 28]), ("sigma", ["batch"]),
    ]  # fmt: skip


def test_files_with_other_inputs_are_refused(tmp_path):
    """As those of earlier versions, whose NCSN files took the level itself."""
    of, path = model("ncsn"), tmp_path / "old.onnx"
    proto = onnx.load_from_string(make_onnx(of))
    (search,) = (node for node in proto.graph.node if node.op_type == "ArgMin")
    proto.graph.input[1].CopyFrom(onnx.helper.make_tensor_value_info("level", 7, ["batch"]))
    for node in proto.graph.node:
        node.input[:] = ["level" if name == search.output[0] else name for name in node.input]
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(EngineError, match=r"old.onnx does not hold the graph .*; write it anew"):
        read_onnx(path, of, "fp32")


def dimensions(value):
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("opset", onnx_model.OPSETS)
def test_opsets(opset):
    of = model("ncsn")
    content = make_onnx(of, opset=opset)
    proto = onnx.load_from_string(content)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    x, sigma = noisy(of)
    assert error(of, ort(content)(feeds(of, x, sigma)), x, sigma) < FP32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "tf32"}, "dtype must be fp32, fp16, bf16; got 'tf32'"),
        ({"opset": 19}, "opset must be 20 to 23 for fp32; got 19"),
        ({"opset": 21, "dtype": "bf16"}, "opset must be 22 to 23 for bf16; got 21"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"size": (9, 8)}, "multiples of 2; got 9x8"),
        ({"size": (2**62, 8)}, r"the shape 1x1x4611686018427387904x8 declares [\d,]+ elements"),
    ],
)
def test_what_cannot_be_written(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export_onnx(model(), tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_networks_beyond_two_gigabytes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_model, "LIMIT", 10_000)
    with pytest.raises(ValueError, match=r"GB of weights do not fit an ONNX file.*choose dtype"):
        export_onnx(model(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_not_written(tmp_path):
    of = model()
    with torch.no_grad():
        of.net.end_conv.bias[0] = math.nan
    with pytest.raises(EngineError, match="own output is not finite"):
        export_onnx(of, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_half_that_overflows_is_not_written(tmp_path):
    of = model()
    with torch.no_grad():
        of.net.end_conv.weight.fill_(1e6)
    with pytest.raises(EngineError, match="'ort' in fp16 differs from the reference by"):
        export_onnx(of, tmp_path / "m.onnx", dtype="fp16")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with full_disk(1000), pytest.raises(OSError, match="Nothing was changed"):
        export_onnx(model(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn", "unet_a"])
def test_files_are_read_back(arch, tmp_path):
    of = model(arch, seed=1)
    written = export_onnx(of, tmp_path / "sub" / "m.onnx", dtype="fp16")
    assert written.path.stat().st_size == written.size
    assert 1e-7 < written.error < 5e-3
    assert read_onnx(written.path, of, "fp16") == make_onnx(of, dtype="fp16")


def foreign(proto):
    del proto.metadata_props[:]


def custom(proto):
    proto.graph.node[5].domain = "com.microsoft"


def external(proto):
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def hidden(proto):
    node = proto.graph.node.add(op_type="Constant", output=["hidden"])
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=1)
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=tensor)


def broken(proto):
    proto.graph.node[3].input[0] = "nowhere"


def swapped(proto):
    first, second = proto.graph.initializer[:2]
    first.raw_data, second.raw_data = first.raw_data[::-1], second.raw_data


def huge(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 10**9


def odd(proto):
    for dim, value in zip(
        proto.graph.input[0].type.tensor_type.shape.dim, (1, 1, 7, 24), strict=True
    ):
        dim.dim_value = value


TAMPERED = [
    (foreign, "was not written by ncsn_fast"),
    (custom, "does not hold the graph that ncsn_fast"),
    (external, "does not hold the graph that ncsn_fast"),
    (hidden, "does not hold the graph that ncsn_fast"),
    (broken, "does not hold the graph that ncsn_fast"),
    (swapped, "does not hold the graph that ncsn_fast"),
    (huge, r"declares [\d,]{12,} elements"),
    (odd, "height and width are multiples of 2; got 7x24"),
]


@pytest.mark.parametrize(("change", "words"), TAMPERED, ids=lambda v: getattr(v, "__name__", ""))
def test_files_of_others_are_refused(change, words, tmp_path):
    of, path = model(), tmp_path / "m.onnx"
    proto = onnx.load_from_string(make_onnx(of))
    change(proto)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(EngineError, match=rf"m.onnx:? .*{words}"):
        read_onnx(path, of, "fp32")


def test_other_models_types_and_files_are_refused(tmp_path, monkeypatch):
    of, path = model(), tmp_path / "m.onnx"
    with pytest.raises(EngineError, match="there is no such file"):
        read_onnx(path, of, "fp32")
    content = make_onnx(of)
    path.write_bytes(content)
    with pytest.raises(EngineError, match="holds another model than the one given"):
        read_onnx(path, tiny.model(1, image_size=(16, 24)), "fp32")
    with pytest.raises(EngineError, match="computes in fp32; pass dtype='fp32'"):
        read_onnx(path, of, "fp16")
    for wrong in (content[:-100], b"no ONNX at all", b""):
        path.write_bytes(wrong)
        with pytest.raises(EngineError, match=r"is no ONNX file|was not written by ncsn_fast"):
            read_onnx(path, of, "fp32")
    monkeypatch.setattr(onnx_model, "LIMIT", 10)
    path.write_bytes(content)
    with pytest.raises(EngineError, match="has more bytes than"):
        read_onnx(path, of, "fp32")


def test_without_onnx(monkeypatch, tmp_path):
    monkeypatch.setattr(OrtEngine, "unavailable", lambda: "onnx not installed: pip install it")
    with pytest.raises(EngineUnavailable, match="cannot export to ONNX: onnx not installed"):
        export_onnx(model(), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "fp32, .* MB, checked by onnx.checker; .* by at most .*e-07 at 4 levels over the"),
        ("--dtype fp16 --batch 2", "fp16, .*which rounds weights, but computes in float32"),
        ("--dtype bf16 --opset 23", "bf16, .* its numbers were not run"),
        ("--size 24,16", "fp32, .* differs from PyTorch by at most"),
    ],
)
def test_command(words, said, tiny_folder, capsys):
    out = tiny_folder.parent / "m.onnx"
    command = ["--model", str(tiny_folder), "--out", str(out), *words.split()]
    assert export.main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{out}: ")
    assert re.search(said, text)
    onnx.checker.check_model(str(out), full_check=True)
    assert "export" in __main__.COMMANDS
    assert ncsn_fast.export_onnx is export_onnx


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--format plan", "invalid choice 'plan' for argument '--format'"),
        ("--dtype int8", "invalid choice 'int8' for argument '--dtype'"),
        ("--batch 0", "--batch must be a number or dynamic; got '0'"),
        ("--batch two", "--batch must be a number or dynamic; got 'two'"),
        ("--size 8", "--size must be H,W or dynamic; got '8'"),
        ("--size 8,0", "--size must be H,W or dynamic; got '8,0'"),
        ("--opset 3", "--opset must be 20 to 23 for fp32; got 3"),
        ("--dtype bf16 --opset 20", "--opset must be 22 to 23 for bf16; got 20"),
    ],
)
def test_usage_errors(words, said):
    with pytest.raises(UsageError, match=said):
        export.main(["--out", "m.onnx", *words.split()])


@pytest.mark.parametrize("size", [(-1, 8), (8, -(2**63)), (0, 8)])
def test_files_of_impossible_sizes(tmp_path, size):
    of, path = tiny.model(), tmp_path / "odd.onnx"
    with pytest.raises(ValueError, match="size must be at least 1"):
        make_onnx(of, size=size)
    proto = onnx.load_from_string(make_onnx(of, size=(8, 8)))
    for axis, n in zip((2, 3), size, strict=True):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = n
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(EngineError, match=r"odd\.onnx: size must be at least 1"):
        read_onnx(path, of, "fp32")
