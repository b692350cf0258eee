"""Plain build script for tests, with `trt` as a parameter, and a small network to build."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

RANGE = {"x": ((1, 2, 4, 4), (2, 2, 4, 6), (4, 2, 8, 8)), "level": ((1,), (2,), (4,))}
DTYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
SIZES = ("batch", "height", "width")


def small(dtype="fp32", seed=0, operator="Conv", dims=SIZES):
    """Returns f = elu(conv(x)) + table[level], with two convolutions; builds within a second."""
    generator, kind = np.random.default_rng(seed), DTYPES[dtype]
    batch, height, width = dims

    def tensor(name, shape):
        array = generator.normal(size=shape).astype(np.float32)
        return helper.make_tensor(name, kind, shape, array.reshape(-1))

    table = generator.normal(size=(3, 2, 1, 1)).astype(np.float32)
    conv = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], "cast", to=kind),
        helper.make_node(operator, ["low", "w", "b"], ["c"], "first/Conv", **conv),
        helper.make_node("Elu", ["c"], ["e"], "first/Elu"),
        helper.make_node("Conv", ["e", "v"], ["d"], "second/Conv", **conv),
        helper.make_node("Cast", ["d"], ["h"], "back", to=TensorProto.FLOAT),
        helper.make_node("Gather", ["table", "level"], ["row"], "row"),
        helper.make_node("Add", ["h", "row"], ["f"], "sum"),
    ]
    shape = [batch, 2, height, width]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("level", TensorProto.INT64, [batch]),
    ]
    output = helper.make_tensor_value_info("f", TensorProto.FLOAT, shape)
    weights = [tensor("w", (2, 2, 3, 3)), tensor("b", (2,)), tensor("v", (2, 2, 3, 3))]
    weights.append(numpy_helper.from_array(table, "table"))
    graph = helper.make_graph(nodes, "small", inputs, [output], weights)
    opset = helper.make_opsetid("", 22)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


class Messages(list):
    """Messages that a logger received, as (severity's name, text)."""

    def errors(self):
        return " ".join(text for severity, text in self if severity == "ERROR")


def logger(trt):
    """Returns a logger as user code writes it, and the list that it fills."""
    messages = Messages()

    class Lines(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, msg):
            messages.append((severity.name, msg))

    return Lines(), messages


def monitor(trt, steps=1000):
    """Returns a progress monitor that cancels after some steps, and the list of its calls."""
    told = []

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name, parent_phase, num_steps):
            told.append(("start", phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name, step):
            told.append(("step", phase_name, step))
            return sum(kind == "step" for kind, *_ in told) <= steps

        def phase_finish(self, phase_name):
            told.append(("finish", phase_name))

    return Monitor(), told


class Build:
    """Plain build script that keeps everything it made."""

    def __init__(self, trt, content, ranges=RANGE, typed=True, log=None):
        self.trt = trt
        self.log, self.messages = log or logger(trt)
        self.builder = trt.Builder(self.log)
        flag = int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(typed << flag)
        self.parser = trt.OnnxParser(self.network, self.log)
        self.parsed = self.parser.parse(content)
        self.config = self.builder.create_builder_config()
        self.profiles = [self.add(ranges)] if ranges else []

    def add(self, ranges):
        profile = self.builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        return self.config.add_optimization_profile(profile)

    def plan(self):
        return self.builder.build_serialized_network(self.network, self.config)

    def engine(self):
        return self.trt.Runtime(self.log).deserialize_cuda_engine(self.plan())


class Run:
    """Execution context with buffers for one shape, and a further input by its name."""

    def __init__(self, engine, n=3, size=(6, 5), seed=0, context=None, channels=2, **more):
        generator = torch.Generator().manual_seed(seed)
        self.context = context or engine.create_execution_context()
        self.x = torch.rand(n, channels, *size, generator=generator)
        self.level = torch.arange(n) % 3
        self.f = torch.full_like(self.x, torch.nan)
        self.inputs = {"x": self.x, **(more or {"level": self.level})}
        self.tensors = {**self.inputs, "f": self.f}

    def bind(self):
        for name in self.inputs:
            assert self.context.set_input_shape(name, tuple(self.tensors[name].shape))
        for name, tensor in self.tensors.items():
            assert self.context.set_tensor_address(name, tensor.data_ptr())
        return self

    def __call__(self, stream=0):
        assert self.context.execute_async_v3(stream) is True
        return self.f

    def expected(self, content):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        feeds = {"x": self.x.numpy(), "level": self.level.numpy()}
        return torch.from_numpy(session.run(None, feeds)[0])


def information(engine, trt, context=None):
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def detailed(trt, content, **options):
    build = Build(trt, content, **options)
    build.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return build
