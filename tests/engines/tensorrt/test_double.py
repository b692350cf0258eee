"""The double of TensorRT is as strict as the bindings that its record was read off."""

import importlib.util
import sys

import numpy as np
import pytest
import tensorrt_double as double
import torch
from tensorrt_double import api, builder, config
from tensorrt_double.script import Build, small


@pytest.fixture(params=double.VERSIONS)
def trt(request):
    return double.make(request.param)


# The record


@pytest.mark.parametrize("version", double.VERSIONS)
def test_signatures_cover_the_names_of_every_class(version):
    record = api.read(version)
    assert record["version"].startswith(version)
    classes = record["classes"]
    for one in classes.values():
        own = {*one["methods"], *one["properties"], *one["constants"]} - {"__getitem__"}
        inherited = set(classes[one["base"]]["names"]) if one["base"] else set()
        nested = {"Severity"} & set(one["names"])
        assert own | inherited | nested == set(one["names"])
        assert own
    known = {*record["classes"], *record["enums"], *record["others"]}
    known |= {"int", "float", "bool", "str", "tuple", "list", "object", "buffer", "slice"}
    known |= {"capsule"}
    arguments = [
        argument
        for one in classes.values()
        for overloads in one["methods"].values()
        for overload in overloads or []
        for argument in overload["arguments"]
    ]
    kinds = {a[1].removeprefix("sequence[").removesuffix("]") for a in arguments}
    kinds |= {
        kind.removeprefix("sequence[").removesuffix("]")
        for one in classes.values()
        for kind, _ in one["properties"].values()
    }
    assert kinds <= known
    assert {len(a) for a in arguments} == {2, 3}


def test_what_version_11_removed():
    old, new = (double.make(version) for version in double.VERSIONS)
    for enum, member in (
        ("BuilderFlag", "FP16"), ("BuilderFlag", "BF16"), ("BuilderFlag", "INT8"),
        ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"), ("TacticSource", "CUBLAS"),
    ):  # fmt: skip
        assert getattr(getattr(old, enum), member).name == member
        with pytest.raises(AttributeError, match=f"TensorRT 11.4 has no {enum}.{member}"):
            getattr(getattr(new, enum), member)
    assert old.BuilderFlag.TF32 != new.BuilderFlag.TF32
    assert int(old.BuilderFlag.TF32) == int(new.BuilderFlag.TF32) == 6
    with pytest.raises(
        AttributeError, match=r"module 'tensorrt' 11\.4\.0\.106 has no attribute 'IInt"
    ):
        new.IInt8Calibrator  # noqa: B018
    with pytest.raises(NotImplementedError, match="does not have IInt8Calibrator"):
        old.IInt8Calibrator  # noqa: B018
    for name in ("platform_has_fast_fp16", "supports_model", "device_memory_size"):
        owner = {"p": "Builder", "s": "OnnxParser", "d": "ICudaEngine"}[name[0]]
        assert hasattr(getattr(old, owner), name)
        assert not hasattr(getattr(new, owner), name)


def test_definitions_are_held_to_the_record(trt):
    interface = trt.Builder._api

    class MadeUp(builder.Builder):
        def create_plan(self):
            pass

    class Renamed(builder.Builder):
        def create_network(self, flag):
            pass

    class Stored(config.IBuilderConfig):
        stored = ("max_workspace_size",)

    for name, kind, words in (
        ("Builder", MadeUp, "has no Builder.create_plan"),
        ("Builder", Renamed, r"takes \[\['flags'\]\]; the double has \['flag'\]"),
        ("IBuilderConfig", Stored, "max_workspace_size"),
    ):
        with pytest.raises(TypeError, match=words):
            interface.add_class(name, kind)


def test_module(trt, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert importlib.util.find_spec("tensorrt") is trt.__spec__
    assert importlib.import_module("tensorrt").float32 is trt.DataType.FLOAT
    assert trt.nptype(trt.int64) is np.int64
    with pytest.raises(TypeError, match="Could not resolve"):
        trt.nptype(trt.bfloat16)
    with pytest.raises(ValueError, match=r"one of 10\.16, 11\.4; got '9'"):
        double.make("9")


# Strictness


def test_enums_are_pybind11s(trt):
    severity, flag = trt.ILogger.Severity, trt.BuilderFlag
    assert trt.Logger.ERROR is trt.ILogger.ERROR is severity.ERROR
    assert severity.ERROR < severity.WARNING <= trt.Logger.WARNING
    assert (severity.ERROR == 1, severity.ERROR == flag.DEBUG) == (False, False)
    assert (int(flag.REFIT), flag.REFIT.name, str(flag.REFIT)) == (4, "REFIT", "BuilderFlag.REFIT")
    assert repr(flag.REFIT) == "<BuilderFlag.REFIT: 4>"
    assert flag(4) == flag.REFIT
    assert flag(4) in {flag.REFIT}
    assert flag.__members__["REFIT"] is flag.REFIT
    for wrong in (
        lambda: severity.ERROR <= 2, lambda: severity.ERROR < flag.DEBUG, lambda: 1 << flag.REFIT,
        lambda: flag.TF32 | flag.REFIT, lambda: [*flag], lambda: flag["REFIT"], lambda: flag(6.0),
        lambda: trt.DataType.FLOAT < trt.DataType.HALF,
    ):  # fmt: skip
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(AttributeError):
        flag.REFIT.value = 3


def test_dims_compare_with_tuples_and_lists_only(trt):
    dims = trt.Dims([1, 2, 3])
    assert (tuple(dims), len(dims), dims[-1], dims[:2]) == ((1, 2, 3), 3, 3, (1, 2))
    assert dims == (1, 2, 3)
    assert [1, 2, 3] == dims  # noqa: SIM300
    assert str(dims) == "(1, 2, 3)"
    for wrong in (lambda: dims == trt.Dims((1, 2, 3)), lambda: hash(dims), lambda: trt.Dims(3)):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="Input length 9"):
        trt.Dims([1] * 9)
    with pytest.raises(IndexError):
        dims[3]


def test_unknown_names_and_read_only_properties(trt):
    build = Build(trt, small())
    version = trt.__version__.rpartition(".")[0].rpartition(".")[0]
    with pytest.raises(AttributeError, match=f"'IBuilderConfig' object of TensorRT {version} has"):
        build.config.max_workspace_size  # noqa: B018
    with pytest.raises(AttributeError, match="has no 'max_workspace_size'"):
        build.config.max_workspace_size = 1
    with pytest.raises(AttributeError, match="'num_inputs' of 'INetworkDefinition' has no setter"):
        build.network.num_inputs = 3
    with pytest.raises(AttributeError, match=r"has no Builder\.build_cuda_engine"):
        trt.Builder.build_cuda_engine  # noqa: B018
    for exists in (
        lambda: build.builder.get_plugin_registry(), lambda: build.network.add_identity(None),
        lambda: build.config.plugins_to_serialize, lambda: build.network[0],
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match="the double of TensorRT does not have"):
            exists()
    for kind in (trt.IBuilderConfig, trt.ICudaEngine, trt.IHostMemory):
        with pytest.raises(TypeError, match="No constructor defined!"):
            kind()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t, b: b.builder.create_network(0, 1),
        lambda t, b: b.builder.create_network(flag=0),
        lambda t, b: b.builder.create_network(0, flags=0),
        lambda t, b: b.builder.create_network(-1),
        lambda t, b: b.builder.create_network("1"),
        lambda t, b: b.builder.create_network(1.0),
        lambda t, b: b.config.set_flag(6),
        lambda t, b: b.config.set_flag(),
        lambda t, b: b.config.set_flag(t.MemoryPoolType.WORKSPACE),
        lambda t, b: b.config.set_memory_pool_limit(t.MemoryPoolType.WORKSPACE, -1),
        lambda t, b: b.config.set_memory_pool_limit(t.MemoryPoolType.WORKSPACE, 1e9),
        lambda t, b: setattr(b.config, "builder_optimization_level", 3.0),
        lambda t, b: setattr(b.config, "profiling_verbosity", 2),
        lambda t, b: setattr(b.config, "profiling_verbosity", None),
        lambda t, b: setattr(b.config, "progress_monitor", object()),
        lambda t, b: b.config.set_timing_cache(None, False),
        lambda t, b: b.config.create_timing_cache("text"),
        lambda t, b: b.config.set_timing_cache(b.config.create_timing_cache(b"")),
        lambda t, b: b.parser.parse("model.onnx"),
        lambda t, b: b.parser.parse_from_file(b),
        lambda t, b: b.builder.build_serialized_network(b.network),
        lambda t, b: b.builder.build_serialized_network(b.config, b.network),
        lambda t, b: b.builder.create_optimization_profile().set_shape("x", (1.5,), (1,), (1,)),
        lambda t, b: b.builder.create_optimization_profile().set_shape("x", (1,), (1,)),
        lambda t, b: b.builder.create_optimization_profile().set_shape(b, (1,), (1,), (1,)),
        lambda t, b: t.Builder(),
        lambda t, b: t.Builder(None),
        lambda t, b: t.Logger(1),
        lambda t, b: t.OnnxParser(b.builder, b.log),
        lambda t, b: t.Runtime(b.log).deserialize_cuda_engine("plan"),
    ],
)
def test_wrong_arguments(trt, wrong):
    with pytest.raises(TypeError, match=r"incompatible function arguments"):
        wrong(trt, Build(trt, small()))


def test_arguments_that_pybind11_takes(trt):
    build = Build(trt, small())
    build.builder.create_network(np.int64(0))
    build.builder.create_network(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    build.config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, pool_size=1 << 30)
    assert build.config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 30
    profile = build.builder.create_optimization_profile()
    profile.set_shape("x", trt.Dims([1, 2, 4, 4]), [1, 2, 4, 4], torch.Size((1, 2, 4, 4)))
    assert [tuple(shape) for shape in profile.get_shape("x")] == [(1, 2, 4, 4)] * 3
    build.config.progress_monitor = None
    cache = build.config.create_timing_cache(bytearray())
    assert build.config.set_timing_cache(cache, ignore_mismatch=0) is True
    assert build.config.get_timing_cache() is cache


def test_host_memory_is_only_a_buffer(trt):
    memory = Build(trt, small()).plan()
    assert memory.nbytes == len(bytes(memory)) == memoryview(memory).nbytes > 500
    assert memory.dtype == trt.DataType.INT8
    assert np.frombuffer(memory, np.uint8).tobytes() == bytes(memory)
    for wrong in (len, iter, lambda m: m[0], lambda m: m + b"", lambda m: b"a" in m):
        with pytest.raises(TypeError):
            wrong(memory)
    for name in ("hex", "decode", "append", "tobytes"):
        with pytest.raises(AttributeError, match=f"'{name}'"):
            getattr(memory, name)
    assert memory != bytes(memory)
    assert memory
