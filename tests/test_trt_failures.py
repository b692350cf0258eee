"""What can go wrong while TensorRT's engine is built and run; each with one error."""

import logging
import sys
import types

import pytest
import tiny
import torch
from drawing import CLOSE, draw
from trt_cases import engine, plans, sampler

import ncsn_fast
from ncsn_fast import EngineError, EngineUnavailable, Sampler, export_trt
from ncsn_fast.engines import trt_api, trt_runtime


def test_an_engine_that_computes_something_else_is_not_kept(knobs, builds):
    knobs.output_error = 0.5
    with pytest.raises(EngineError, match=r"'trt' in fp32 differs from the reference by \d"):
        engine(tiny.model())
    assert plans() == []
    knobs.output_error = 0.0
    engine(tiny.model())
    assert len(builds) == 2


def test_another_type_is_tried_where_nobody_asked_for_one(knobs, builds, caplog):
    knobs.output_error = 0.02
    of = tiny.model()
    with caplog.at_level(logging.WARNING), pytest.raises(EngineError, match="'trt' in fp32"):
        Sampler(of, engine="trt", batch_size=2).engine_for(2)
    tried = [record.getMessage().split(":")[0] for record in caplog.records]
    assert tried == ["trying bf16", "trying tf32", "trying fp32"]


def test_a_convolution_in_float_is_noticed(knobs):
    knobs.float_convolution = True
    words = r"TensorRT computes \S+ in fp32 instead of fp16; .*engine='cuda'"
    with pytest.raises(EngineError, match=words):
        engine(tiny.model(), "fp16")
    assert plans() == []


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
    with pytest.raises(EngineUnavailable, match=r"8\.6\.1 has another .* 'tensorrt>=10.16,<12'"):
        trt_api.load()


def test_versions_that_nobody_tested_say_so(monkeypatch, caplog):
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.9.0"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with caplog.at_level(logging.INFO):
        assert trt_api.load() is module
    assert "tensorrt 10.9.0: tested are 10.16 and 11.4" in caplog.text


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
