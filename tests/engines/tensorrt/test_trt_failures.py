"""What can go wrong while TensorRT's engine is built and run; each with one error."""

import logging
import re
import sys
import types

import pytest
import tiny
import torch
from drawing import CLOSE, draw
from trt_cases import engine, plans, sampler

import ncsn_fast
from ncsn_fast import EngineError, EngineUnavailable, Sampler, export_trt
from ncsn_fast.engines.base import PrecisionError
from ncsn_fast.engines.tensorrt import api as trt_api
from ncsn_fast.engines.tensorrt import runtime as trt_runtime
from ncsn_fast.engines.tensorrt.plan_cache import PlanCache


def test_an_engine_that_computes_something_else_is_not_kept(knobs, builds):
    knobs.output_error = 0.5
    with pytest.raises(EngineError, match=r"'trt' in fp32 differs from the reference by \d"):
        engine(tiny.model())
    assert plans() == []
    knobs.output_error = 0.0
    with pytest.raises(PrecisionError, match=r"earlier build: `ncsn-fast cache clear` forgets it"):
        engine(tiny.model())
    assert len(builds) == 1
    PlanCache().clear()
    engine(tiny.model())
    assert len(builds) == 2


def test_what_is_refused_is_a_model_not_its_structure(knobs, builds):
    knobs.output_error = 0.5
    with pytest.raises(PrecisionError):
        engine(tiny.model(), refit="on")
    knobs.output_error = 0.0
    assert engine(tiny.model(1), refit="on").error < 1e-5
    assert len(builds) == 2


def test_only_precision_makes_another_type_be_tried(knobs, builds, caplog):
    knobs.fail_build = True
    with caplog.at_level(logging.WARNING), pytest.raises(EngineError, match="could not build"):
        Sampler(tiny.model(), engine="trt").engine_for(2)
    assert len(builds) == 1
    assert "trying" not in caplog.text


def test_another_type_is_tried_where_nobody_asked_for_one(knobs, builds):
    knobs.output_error = 0.02
    of = tiny.model()
    with pytest.raises(EngineError, match=r"'trt' in fp32 .* use engine='auto'"):
        Sampler(of, engine="trt", batch_size=2).engine_for(2)
    assert len(builds) == 4  # fp16, bf16, tf32, fp32


@pytest.mark.parametrize("which", [1, 2, 7])
@pytest.mark.parametrize("size", ["8,8", "8,8:8,8:16,16"])
def test_a_convolution_in_float_is_noticed(knobs, which, size):
    """Whether its layer tells its weights or its kernel alone; ports may say nothing."""
    knobs.float_convolution = which
    words = r"TensorRT computes \S+ in fp32 instead of fp16; .*engine='cuda'"
    with pytest.raises(PrecisionError, match=words):
        engine(tiny.model(), "fp16", size=size, batch=2)
    assert plans() == []


def test_convolutions_that_tell_nothing_leave_a_warning(knobs, caplog):
    knobs.tells_types = False
    with caplog.at_level(logging.WARNING):
        engine(tiny.model(), "fp16")
    assert re.search(r"tells the types of 0 of \d\d convolutions", caplog.text)


def test_what_a_layer_computes_in():
    def layer(**entry):
        return trt_runtime._layer({"Metadata": "[ONNX Layer: a/Conv_2]"} | entry)

    dynamic = {"Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}
    half = {"Inputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}]}
    kernel = "sm80_xmma_fprop_implicit_gemm_{}_nhwckrsc_nhwc_tilesize128"
    for found, entry in (
        (None, dynamic),
        ("fp16", half),
        ("bf16", {"Inputs": [{"Format/Datatype": "BFloat16"}]}),
        ("fp32", {**half, "Weights": {"Type": "Float"}}),
        ("fp16", {**dynamic, "TacticName": kernel.format("f16f16_f16f32_f32")}),
        ("fp32", {**half, "TacticName": kernel.format("tf32f32_tf32f32_f32")}),
        ("bf16", {**dynamic, "TacticName": kernel.format("bf16bf16_bf16f32_f32")}),
    ):
        assert layer(**entry).dtype == found
    casting = "[ONNX Layer: a/Cast]\x1f[ONNX Layer: a/Conv]"
    full = {"Inputs": [{"Format/Datatype": "Float"}]}
    assert (layer(**full).dtype, layer(**full, Metadata=casting).dtype) == ("fp32", None)
    layers = [layer(**half), layer(**dynamic)]
    assert trt_runtime.check_types(layers, "fp16") == (1, 2)
    transposed = [trt_runtime.Layer("x", "", ("a/ConvTranspose",), "fp32")]
    assert trt_runtime.check_types(transposed, "bf16") == (0, 0)
    with pytest.raises(PrecisionError, match="x in fp32 instead of fp16"):
        trt_runtime.check_types(transposed, "fp16")


def test_a_build_that_fails(knobs):
    knobs.fail_build = True
    with pytest.raises(EngineError, match=r"TensorRT could not build an engine: .+; free GPU"):
        engine(tiny.model())
    knobs.fail_build, knobs.fail_context = False, True
    with pytest.raises(EngineError, match=r"cannot make an execution context: .+; free GPU memory"):
        engine(tiny.model())


def test_a_run_that_fails(knobs):
    built = engine(tiny.model())
    knobs.fail_run = True
    with pytest.raises(EngineError, match=r"TensorRT could not run: .+; .*graph='none'"):
        built.output(torch.rand(2, 1, 8, 8), None)


def test_memory_and_profiles_that_are_refused(knobs, monkeypatch):
    built = engine(tiny.model())
    network, inputs = built._network, {"x": torch.rand(2, 1, 8, 8)}
    output = torch.zeros(2, 1, 8, 8)
    made = network.new_context(inputs, output)[0]
    log = network._log

    class Context:  # one whose memory is refused: TensorRT says so in its log alone
        def __getattr__(self, name):
            return getattr(made, name)

        def set_device_memory(self, memory, size):
            log.log(trt_api.load().ILogger.ERROR, "too small")

    class Engine:
        def __getattr__(self, name):
            return getattr(real, name)

        def create_execution_context(self, strategy):
            return given

    real, given = network.engine, Context()
    monkeypatch.setattr(network, "engine", Engine())
    with pytest.raises(EngineError, match="takes no memory for its maps: too small; "):
        network.new_context(inputs, output)

    def refuse(index, stream):
        made.set_optimization_profile_async(7, stream)

    given.set_optimization_profile_async = refuse
    with pytest.raises(EngineError, match=r"does not take its own profile: .+; "):
        network.new_context(inputs, output)


def test_no_driver(knobs):
    knobs.driver = False
    with pytest.raises(
        EngineUnavailable, match=r"cannot use this machine's GPU \(.*35.*nvidia-smi"
    ):
        engine(tiny.model())


def test_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # import raises ImportError
    with pytest.raises(EngineUnavailable, match=r"tensorrt does not import \(.*pip install"):
        trt_api.load()
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    sys.modules["tensorrt"].__version__ = "8.6.1"
    with pytest.raises(
        EngineUnavailable, match=r"8\.6\.1 is not from 10\.16 to 11: .* 'tensorrt>=10.16,<12'"
    ):
        trt_api.load()


def test_versions_that_nobody_tested_say_so(monkeypatch, caplog):
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.17.0"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with caplog.at_level(logging.INFO):
        assert trt_api.load() is module
    assert "tensorrt 10.17.0: tested are 10.16 and 11.4" in caplog.text


def test_without_gpu_and_tensorrt_the_message_names_both(monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    read = []
    monkeypatch.setattr(ncsn_fast.sampler, "resolve_model", read.append)
    words = (
        r"engine 'trt' .* cannot run here: torch sees no NVIDIA GPU .*; tensorrt not installed: "
        r"pip install 'tensorrt>=10\.16,<12'\. Engines that run here: .*cpu"
    )
    with pytest.raises(EngineUnavailable, match=words):
        ncsn_fast.Sampler(engine="trt")
    assert not read  # before the model is
    with pytest.raises(EngineUnavailable, match="engine 'trt'"):
        export_trt(tiny.model(), "m.plan")


def test_too_little_memory_halves_the_micro_batch(knobs, builds, monkeypatch, caplog):
    """As TensorRT says it: OutOfMemory, in one word."""
    ours, real = sampler(tiny.model(), 4), trt_runtime.TrtNetwork.execute
    expected = draw(ours, 4)

    def execute(self, context, stream):
        if tuple(context.get_tensor_shape("x")) == (4, 1, 8, 8):
            raise EngineError("TensorRT could not run: Error Code 2: OutOfMemory (requested ...)")
        real(self, context, stream)

    monkeypatch.setattr(trt_runtime.TrtNetwork, "execute", execute)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(draw(ours, 4), expected, **CLOSE)
    assert "micro-batches of 4; going on with 2" in caplog.text
    assert len(builds) == 1
