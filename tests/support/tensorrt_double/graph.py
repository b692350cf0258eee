"""ONNX graphs as TensorRT sees them: shapes, layers, and sessions that compute on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

DATA_TYPES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT64": "INT64",
              "INT32": "INT32", "BOOL": "BOOL"}  # fmt: skip
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32}


@dataclasses.dataclass(frozen=True)
class Value:
    """Tensor: its name, DataType member, and sizes; dynamic sizes are names, unknown ones "?"."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    @property
    def shape(self) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self.dims]

    @property
    def open(self) -> bool:
        return -1 in self.shape


def parse(content: bytes) -> onnx.ModelProto | None:
    """Parses a model; None if the bytes are not a protobuf message."""
    try:
        return onnx.ModelProto.FromString(content)
    except DecodeError:
        return None


def value(info: Any) -> Value:
    kind = info.type.tensor_type
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or "?")
        for dim in kind.shape.dim
    )
    name = TensorProto.DataType.Name(kind.elem_type)
    return Value(info.name, DATA_TYPES.get(name, name), dims)


def values(model: onnx.ModelProto) -> dict[str, Value]:
    """Returns every tensor of a graph, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {one.name: value(one) for one in (*graph.input, *graph.output, *graph.value_info)}
    for one in graph.initializer:
        name = TensorProto.DataType.Name(one.data_type)
        found[one.name] = Value(one.name, DATA_TYPES.get(name, name), tuple(one.dims))
    return found


def structure(model: onnx.ModelProto) -> list[Any]:
    """Returns everything but the weights, which a refit must match."""
    graph = model.graph
    return [
        [node.SerializeToString(deterministic=True) for node in graph.node],
        [(one.name, tuple(one.dims), one.data_type) for one in graph.initializer],
        [one.SerializeToString(deterministic=True) for one in (*graph.input, *graph.output)],
    ]


def session(content: bytes) -> onnxruntime.InferenceSession:
    """Returns an ONNX Runtime session on one thread.

    bfloat16, which ONNX Runtime does not support, becomes float32 with rounded weights.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = without_bfloat16(onnx.load_from_string(content))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def without_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    def plain(tensor: TensorProto) -> None:
        if tensor.data_type == TensorProto.BFLOAT16:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    for tensor in model.graph.initializer:
        plain(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            plain(attribute.t)
    for info in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def concrete(dims: tuple[int | str, ...], sizes: dict[str, int]) -> tuple[int, ...] | None:
    """Replaces named sizes by numbers; None if one is unknown."""
    known = [size if isinstance(size, int) else sizes.get(size) for size in dims]
    return None if None in known else tuple(size for size in known if size is not None)
