"""Engines of the double of TensorRT: they compute what ONNX Runtime does, and say what they are."""

import ctypes
import gc
import weakref

import onnx
import pytest
import tensorrt_double as double
import tiny
import torch
from onnx import numpy_helper
from tensorrt_double import plan
from tensorrt_double.script import RANGE, Build, Run, detailed, information, logger, small

from ncsn_fast.engines.onnx.model import make_onnx


@pytest.fixture(params=double.VERSIONS)
def trt(request):
    return double.make(request.param)


def test_plans_load_where_they_were_built(trt):
    behaviour = double.behaviour_of(trt)
    build = Build(trt, small())
    content = bytes(build.plan())
    runtime = trt.Runtime(build.log)
    assert runtime.deserialize_cuda_engine(memoryview(content)) is not None
    for damaged in (b"", b"garbage", content[:-1], content[:40], content[:-1] + b"\0"):
        build.messages.clear()
        assert runtime.deserialize_cuda_engine(damaged) is None
        assert "IRuntime::deserializeCudaEngine: Error Code" in build.messages.errors()
    other = double.make(next(v for v in double.VERSIONS if not trt.__version__.startswith(v)))
    log, messages = logger(other)
    assert other.Runtime(log).deserialize_cuda_engine(content) is None
    assert f"expecting library version {other.__version__} got {trt.__version__}" in (
        messages.errors()
    )
    behaviour.gpu = "NVIDIA H200"
    build.messages.clear()
    assert runtime.deserialize_cuda_engine(content) is not None
    assert "across different models of devices" in build.messages[0][1]
    behaviour.capability = "8.0"
    assert runtime.deserialize_cuda_engine(content) is None
    assert "expecting compute 8.0 got compute 9.0" in build.messages.errors()
    build.config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    portable = build.plan()
    behaviour.capability = "9.0"
    engine = runtime.deserialize_cuda_engine(portable)
    assert engine.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS


def test_engines_say_what_they_are(trt):
    build = Build(trt, small())
    build.network.name = "score"
    wide = {"x": ((1, 2, 4, 4), (8, 2, 4, 6), (16, 2, 8, 8)), "level": ((1,), (8,), (16,))}
    assert build.add(wide) == 1
    engine = build.engine()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    assert (engine.name, names, engine[0]) == ("score", ["x", "level", "f"], "x")
    modes = [engine.get_tensor_mode(name).name for name in (*names, "nope")]
    assert modes == ["INPUT", "INPUT", "OUTPUT", "NONE"]
    assert [engine.get_tensor_dtype(n).name for n in names] == ["FLOAT", "INT64", "FLOAT"]
    image = -1, 2, -1, -1
    assert [tuple(engine.get_tensor_shape(name)) for name in names] == [image, (-1,), image]
    assert engine.num_optimization_profiles == 2
    for index, ranges in enumerate((RANGE, wide)):
        for name, shapes in ranges.items():
            assert (*map(tuple, engine.get_tensor_profile_shape(name, index)),) == shapes
    small_memory, large = map(engine.get_device_memory_size_for_profile_v2, range(2))
    assert engine.device_memory_size_v2 == large == 4 * small_memory > 0
    assert (engine.refittable, engine.get_tensor_name(3)) == (False, None)
    again = trt.Runtime(build.log).deserialize_cuda_engine(engine.serialize())
    assert again.num_layers == engine.num_layers > 0
    assert not build.messages.errors()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_results_are_onnx_runtimes(trt, dtype):
    content = small(dtype)
    engine = Build(trt, content).engine()
    for n, size in ((1, (4, 4)), (3, (6, 5)), (4, (8, 8))):
        run = Run(engine, n, size, seed=n).bind()
        assert torch.equal(run(), run.expected(content))
        run.x.add_(1.0)  # the same memory, other numbers
        assert torch.equal(run(), run.expected(content))


def test_fixed_sizes_need_no_profile(trt):
    content = small(dims=(3, 6, 5))
    engine = Build(trt, content, ranges=None).engine()
    assert tuple(engine.get_tensor_shape("x")) == (3, 2, 6, 5)
    assert [tuple(s) for s in engine.get_tensor_profile_shape("x", 0)] == [(3, 2, 6, 5)] * 3
    assert (engine.num_optimization_profiles, engine.create_execution_context().infer_shapes()) == (
        1, [],
    )  # fmt: skip
    run = Run(engine).bind()
    assert torch.equal(run(), run.expected(content))
    wrong = Build(trt, content)
    assert wrong.plan() is None
    assert "static dimensions that don't match kMIN" in wrong.messages.errors()


def test_bfloat16_rounds_the_weights(trt):
    run = Run(Build(trt, small("bf16")).engine()).bind()
    model = onnx.load_from_string(small("fp32"))
    for tensor in model.graph.initializer:
        if tensor.name != "table":
            array = torch.from_numpy(numpy_helper.to_array(tensor).copy()).bfloat16().float()
            tensor.CopyFrom(numpy_helper.from_array(array.numpy(), tensor.name))
    assert torch.equal(run(), run.expected(model.SerializeToString()))
    assert not torch.equal(run.f, run.expected(small("fp32")))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_our_networks_run(trt, dtype):
    of = tiny.model(arch="ncsn", channels=2, n_sigmas=3, image_size=(8, 8))
    ranges = {"x": ((1, 2, 8, 8), (2, 2, 8, 8), (3, 2, 8, 8)), "sigma": ((1,), (2,), (3,))}
    build = detailed(trt, make_onnx(of, dtype=dtype), ranges=ranges)
    engine = build.engine()
    run = Run(engine, 3, (8, 8), sigma=of.sigmas).bind()
    with torch.no_grad():
        expected = of(run.x, run.level)
    error = ((run() - expected).norm() / expected.norm()).item()
    assert error < {"fp32": 5e-6, "fp16": 2e-2, "bf16": 1e-1}[dtype]
    layers = information(engine, trt)["Layers"]
    graph = onnx.load_from_string(make_onnx(of, dtype=dtype)).graph
    assert set(convolutions(layers)) == {n.name for n in graph.node if n.op_type == "Conv"}
    assert not build.messages.errors()


def test_contexts_refuse_what_is_missing_or_out_of_range(trt):
    build = Build(trt, small())
    run = Run(build.engine())
    context = run.context

    def error():
        text = build.messages.errors()
        build.messages.clear()
        return text

    assert context.infer_shapes() == ["x", "level"]
    assert not context.all_binding_shapes_specified
    assert context.execute_async_v3(0) is False
    assert "dimensions are not specified: x, level" in error()
    for shape, words in (
        ((5, 2, 4, 4), "does not satisfy any optimization profiles"),
        ((1, 2, 3, 4), "does not satisfy any optimization profiles"),
        ((1, 3, 4, 4), "Static dimension mismatch"),
        ((1, 2, 4), "Static dimension mismatch"),
    ):
        assert context.set_input_shape("x", shape) is False
        assert words in error()
    for wrong in (
        lambda: context.set_input_shape("nope", (1,)), lambda: context.set_input_shape("f", (1,)),
        lambda: context.set_tensor_address("nope", 8),
    ):  # fmt: skip
        assert wrong() is False
        assert "Given invalid tensor name" in error()
    for wrong in (
        lambda: context.set_input_shape("x", 3), lambda: context.set_input_shape("x", run.x),
        lambda: context.set_tensor_address("x", run.x), lambda: context.execute_async_v3(None),
        lambda: context.set_tensor_address("x", -8), lambda: context.execute_async_v3(),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            wrong()
    assert context.set_input_shape("x", [3, 2, 6, 5])
    assert tuple(context.get_tensor_shape("f")) == (3, 2, 6, 5)
    assert context.set_input_shape("level", trt.Dims([2]))
    with pytest.raises(RuntimeError):
        context.infer_shapes()
    assert context.execute_async_v3(0) is False
    assert "Dimensions with name batch must be equal" in error()
    assert context.set_input_shape("level", (3,))
    assert (context.infer_shapes(), context.all_binding_shapes_specified) == ([], True)
    for name, tensor in run.tensors.items():
        assert context.execute_async_v3(0) is False
        assert f"tensor {name}. Call set" in error()
        assert context.get_tensor_address(name) == 0
        assert context.set_tensor_address(name, tensor.data_ptr())
        assert context.get_tensor_address(name) == tensor.data_ptr()
    assert context.execute_async_v3(stream_handle=7) is True
    assert not build.messages
    assert torch.equal(run.f, run.expected(small()))
    assert context.execute_async_v3(0) is True
    assert "Using default stream" in build.messages[0][1]
    calls = double.calls_of(context)
    assert [call.ok for call in calls] == [False] * 5 + [True] * 2
    assert [call.stream for call in calls[-2:]] == [7, 0]
    assert calls[-1].shapes == {"x": (3, 2, 6, 5), "level": (3,)}
    assert calls[-1].addresses == {name: t.data_ptr() for name, t in run.tensors.items()}


def test_profiles_are_switched(trt):
    build = Build(trt, small())
    build.add({"x": ((8, 2, 4, 4),) * 3, "level": ((8,),) * 3})
    run = Run(build.engine(), 8, (4, 4))
    context = run.context
    assert context.active_optimization_profile == 0
    assert context.set_input_shape("x", (8, 2, 4, 4)) is False
    assert context.set_input_shape("level", (2,))
    assert context.set_optimization_profile_async(1, 0) is True
    assert (context.active_optimization_profile, context.infer_shapes()) == (1, ["x", "level"])
    run.bind()
    assert torch.equal(run(), run.expected(small()))
    assert double.calls_of(context)[0].profile == 1
    with pytest.raises(RuntimeError, match="Error in set optimization profile async"):
        context.set_optimization_profile_async(2, 0)


def test_user_managed_memory(trt):
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    engine = Build(trt, small()).engine()
    run = Run(engine, context=engine.create_execution_context(strategy)).bind()
    assert run.context.execute_async_v3(0) is False
    size = engine.device_memory_size_v2
    memory = (ctypes.c_char * size)()
    for given in (size - 1, size):
        run.context.set_device_memory(ctypes.addressof(memory), given)
        assert run.context.execute_async_v3(0) is (given == size)


def test_failures_of_the_runtime(trt):
    behaviour, build = double.behaviour_of(trt), Build(trt, small())
    engine = build.engine()
    run = Run(engine).bind()
    behaviour.fail_run = True
    assert run.context.execute_async_v3(0) is False
    assert "illegal memory access" in build.messages.errors()
    behaviour.fail_run, behaviour.fail_context = False, True
    assert engine.create_execution_context() is None
    assert "could not be allocated" in build.messages.errors()
    behaviour.output_error = 0.5
    assert torch.equal(run(), run.expected(small()) + 0.5)


def test_objects_live_as_long_as_they_are_used(trt):
    engine = Build(trt, small()).engine()
    context = engine.create_execution_context()
    assert context.engine is engine
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    run = Run(None, context=context).bind()
    assert torch.equal(run(), run.expected(small()))


# Inspector


def convolutions(layers):
    """ONNX name of each convolution -> its layer."""
    found = {}
    for layer in layers:
        for name in layer["Metadata"].replace("\x1e", "\x1f").split("\x1f"):
            if name.endswith("Conv]"):
                found[name.removeprefix("[ONNX Layer: ").removesuffix("]")] = layer
    return found


def types(layer):
    return {port["Format/Datatype"] for port in (*layer["Inputs"], *layer["Outputs"])}


def test_maps_of_open_shapes_have_no_types(trt):
    layers = information(detailed(trt, small("fp16")).engine(), trt)["Layers"]
    assert set.union(*map(types, layers)) == {"N/A due to dynamic shapes"}


def test_layers_in_detail(trt):
    double.behaviour_of(trt).hides_maps = False
    engine = detailed(trt, small("fp16")).engine()
    found = information(engine, trt)
    assert found["Bindings"] == ["x", "level", "f"]
    layers = found["Layers"]
    assert [one["LayerType"] for one in layers] == [
        "kgen", "Reformat", "CaskConvolution", "conv", "kgen",
    ]  # fmt: skip
    assert len(layers) == engine.num_layers
    first, second = convolutions(layers).values()
    assert first["Name"] == "first/Conv + first/Elu"
    assert first["Metadata"] == "[ONNX Layer: first/Conv]\x1f[ONNX Layer: first/Elu]"
    assert first["Weights"] == {"Type": "Half", "Count": 36}
    assert first["ParameterType"] == "Convolution"
    assert "f16f16" in first["TacticName"]
    assert second["Name"].startswith("__myl_Conv_")
    assert "ParameterType" not in second
    (port,) = first["Inputs"]
    assert (port["Name"], port["Location"], port["Dimensions"]) == (
        "low", "Device", [-1, 2, -1, -1],
    )  # fmt: skip
    assert layers[1]["Metadata"] == ""
    assert layers[-1]["Metadata"] == "\x1e".join(
        f"[ONNX Layer: {name}]" for name in ("back", "row", "sum")
    )
    assert {one["Name"] for one in layers[-1]["Inputs"]} == {"d", "level"}
    assert [one["Name"] for one in layers[-1]["Outputs"]] == ["f"]
    assert len(set.union(*map(types, layers))) >= 5  # spellings
    context = Run(engine).bind().context
    shaped = information(engine, trt, context)["Layers"][2]
    assert shaped["Inputs"][0]["Dimensions"] == [3, 2, 6, 5]


def test_layers_by_verbosity(trt):
    build = Build(trt, small())
    names = information(build.engine(), trt)["Layers"]
    assert names[2] == "first/Conv + first/Elu"
    assert all(isinstance(name, str) for name in names)
    build.config.profiling_verbosity = trt.ProfilingVerbosity.NONE
    assert information(build.engine(), trt)["Layers"] == []


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_convolutions_in_another_type_are_seen(dtype):
    def precisions(trt, **options):
        double.behaviour_of(trt).hides_maps = False
        layers = information(detailed(trt, small(dtype), **options).engine(), trt)["Layers"]
        found = convolutions(layers).values()
        low = {"fp16": ("Half", "FP16"), "bf16": ("BFloat16", "BF16")}[dtype]
        assert all(
            any(word in spelling for word in (*low, "Float", "FP32"))
            for one in found
            for spelling in types(one)
        )
        return [all("F" in kind and "16" not in kind for kind in types(one)) for one in found]

    for version in double.VERSIONS:
        trt = double.make(version)
        assert precisions(trt) == [False, False]
        double.behaviour_of(trt).float_convolution = True
        assert precisions(trt) == [True, False]
    assert precisions(double.make("10.16"), typed=False) == [True, True]
    assert precisions(double.make("11.4"), typed=False) == [False, False]


def test_tf32_shows_in_the_tactics(trt):
    for on in (True, False):
        build = detailed(trt, small())
        if not on:
            build.config.clear_flag(trt.BuilderFlag.TF32)
        layers = convolutions(information(build.engine(), trt)["Layers"]).values()
        assert ["tf32" in one["TacticName"] for one in layers] == [on, on]


# Refitting


def test_refit(trt):
    build = Build(trt, small())
    build.config.set_flag(trt.BuilderFlag.REFIT)
    engine = build.engine()
    run = Run(engine).bind()
    assert engine.refittable
    before = run().clone()
    refitter = trt.Refitter(engine, build.log)
    onnx_refitter = trt.OnnxParserRefitter(refitter, build.log)
    assert onnx_refitter.refit_from_bytes(small(seed=1)) is True
    assert torch.equal(run(), before)
    assert refitter.refit_cuda_engine() is True
    assert torch.equal(run(), run.expected(small(seed=1)))
    assert not torch.equal(run.f, before)
    for other in (small("fp16"), small(dims=("n", "height", "width")), small()[:-9]):
        assert onnx_refitter.refit_from_bytes(other) is False
    assert onnx_refitter.num_errors == 3
    assert onnx_refitter.get_error(0).code() == trt.ErrorCode.REFIT_FAILED
    assert set(refitter.get_all_weights()) == {"w", "b", "v", "table"}
    assert refitter.get_missing_weights() == []


def test_engines_without_refit_refuse_a_refitter(trt):
    build = Build(trt, small())
    with pytest.raises(TypeError, match="factory function returned nullptr"):
        trt.Refitter(build.engine(), build.log)
    assert "kREFIT" in build.messages.errors()


def test_plans_are_opaque_and_checked():
    made = plan.Plan("1", "g", "9.0", "NONE", "n", True, False, True, "NONE", False, [], b"\0a\0")
    assert plan.read(made.to_bytes()) == made
    assert plan.read(made.to_bytes()[1:]) is None
    assert plan.read(made.to_bytes() + b"\0") is None
