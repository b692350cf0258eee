"""ONNX files of our networks: written in memory, and validated when read.

A file holds f, the raw output of the network; the factor to the score is applied outside, so that
one graph serves every noise level. Weights are embedded under their state-dict keys. The metadata
name the model (`ScoreModel.digest`), its configuration and noise levels, and the versions that
wrote the file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.engines.base import DTYPES, EngineError
from ncsn_fast.engines.onnx.network import write
from ncsn_fast.engines.onnx.writer import CONSTANTS, Writer
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops.noise import check_integer

LIMIT = 2**31 - 2**24  # bytes of weights: the limit of protobuf, less room for the nodes
OPSETS = range(20, 24)
FIRST_OPSET = {"fp32": 20, "fp16": 20, "bf16": 22}  # before 22, convolutions have no bfloat16
_KINDS = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.int64: "INT64",
}
_IDENTITY = ("model", "config", "dtype")  # metadata that every file of ours has


def make_onnx(
    model: ScoreModel,
    *,
    dtype: str = "fp32",
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    opset: int | None = None,
) -> bytes:
    """Returns the network's raw output f as an ONNX model, checked by onnx.checker.

    Inputs are "x" (N, C, H, W) float32 and, for networks conditioned on it, "level" (N,) int64 or
    "time" (N,) float32; the output is "f" (N, C, H, W) float32.

    Args:
        dtype: "fp32", "fp16" or "bf16": dtype of feature maps and convolutions.
        batch: N; None for dynamic.   size: (H, W); None for dynamic.
        opset: version of the operators; None for the oldest that supports the dtype.

    Raises:
        ValueError: invalid dtype, shape or opset, or the file would exceed 2 GB.
    """
    if dtype not in FIRST_OPSET:
        raise ValueError(f"dtype must be {', '.join(FIRST_OPSET)}; got {dtype!r}")
    oldest, newest = FIRST_OPSET[dtype], OPSETS[-1]
    opset = oldest if opset is None else check_integer("opset", opset)
    if not oldest <= opset <= newest:
        raise ValueError(f"opset must be {oldest} to {newest} for {dtype}; got {opset}")
    if batch is not None:
        batch = check_integer("batch", batch, least=1)
    if size is not None:
        model.net.check_input(torch.empty(1, model.config.channels, *size, device="meta"))
    graph = write(model, DTYPES[dtype], (batch, *size) if batch and size else None)
    stored = sum(tensor.nbytes for tensor in graph.constants.values())
    if stored > LIMIT:
        raise ValueError(
            f"{stored / 1e9:.1f} GB of weights do not fit an ONNX file, which has at most "
            f"{LIMIT / 1e9:.1f} GB; choose dtype 'fp16' or 'bf16', or a narrower network"
        )
    shape = (batch or "batch", model.config.channels, *(size or ("height", "width")))
    proto = _proto(graph, model, shape, opset)
    described = describe(model, dtype)
    for key, value in described.items():
        proto.metadata_props.add(key=key, value=value)
    import onnx

    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def describe(model: ScoreModel, dtype: str) -> dict[str, str]:
    """Returns the metadata of a model's file."""
    own = "1" if model.conditional else "1 / sigma"
    return {
        "model": model.digest(),
        "config": json.dumps(model.config.to_dict(), sort_keys=True),
        "sigmas": json.dumps(model.sigmas.tolist()),
        "data_range": "[0, 1]",
        "conditioning": model.conditioning,
        "score": f"f * {own}",
        "dtype": dtype,
        **{name: package_version(name) for name in ("ncsn_fast", "torch", "onnx")},
    }


def read_onnx(path: str | Path, model: ScoreModel, dtype: str) -> bytes:
    """Reads a file that `make_onnx` wrote for this very model and dtype.

    Raises:
        EngineError: it was not written by make_onnx, holds another model or dtype, or refers to
            other files.
    """
    path = Path(path).expanduser()
    again = "write it anew with `python -m ncsn_fast.export`"
    if not path.is_file():
        raise EngineError(f"{path}: there is no such file; {again}")
    if path.stat().st_size > LIMIT:
        raise EngineError(f"{path} has more than the {LIMIT / 1e9:.1f} GB of an ONNX file; {again}")
    content = path.read_bytes()
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise EngineError(f"{path} is no ONNX file, or half of one; {again}") from error
    found = {entry.key: entry.value for entry in proto.metadata_props}
    domains = {entry.domain for entry in (*proto.opset_import, *proto.graph.node)}
    if any(key not in found for key in _IDENTITY) or proto.functions or domains != {""}:
        raise EngineError(f"{path} was not written by ncsn_fast; {again}")
    if _refers_elsewhere(proto):
        raise EngineError(f"{path} keeps weights in other files, which are not read; {again}")
    if found["model"] != model.digest():
        raise EngineError(f"{path} holds another model than the one given; {again}")
    if found["dtype"] != dtype:
        raise EngineError(f"{path} computes in {found['dtype']}; pass dtype={found['dtype']!r}")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"{path} is damaged; {again}") from error
    return content


def graph_digest(content: bytes, *, weights: bool = True) -> str:
    """Returns the SHA-256 of what an ONNX model of ours computes, whichever versions wrote it.

    Without weights, models that differ only in their parameters have the same digest.
    """
    import onnx

    proto = onnx.ModelProto.FromString(content)
    del proto.metadata_props[:]
    proto.ClearField("producer_version")
    for tensor in proto.graph.initializer:
        if not (weights or tensor.name.startswith(CONSTANTS)):
            tensor.ClearField("raw_data")
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def _refers_elsewhere(proto: Any) -> bool:
    """Returns whether a tensor lies in another file, or anywhere but among the initialisers."""
    elsewhere = ("t", "g", "sparse_tensor", "tensors", "graphs", "sparse_tensors")
    graph = proto.graph
    return (
        any(tensor.data_location == tensor.EXTERNAL for tensor in graph.initializer)
        or bool(graph.sparse_initializer or proto.training_info)
        or any(
            field.name in elsewhere
            for node in graph.node
            for attribute in node.attribute
            for field, _ in attribute.ListFields()
        )
    )


def _proto(graph: Writer, model: ScoreModel, shape: tuple[int | str, ...], opset: int) -> Any:
    import onnx
    from onnx import helper

    kinds = {dtype: getattr(onnx.TensorProto, kind) for dtype, kind in _KINDS.items()}

    def initializer(name: str, tensor: Tensor) -> Any:
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        return onnx.TensorProto(
            name=name, dims=tensor.shape, data_type=kinds[tensor.dtype], raw_data=raw
        )

    def plain(value: Any) -> Any:
        return kinds[value] if isinstance(value, torch.dtype) else value

    nodes = [
        helper.make_node(
            node.kind, node.inputs, [node.output], name=node.name,
            **{key: plain(value) for key, value in node.attributes.items()},
        )
        for node in graph.nodes
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", kinds[torch.float32], shape)]
    if model.conditioning != "none":
        dtype = torch.int64 if model.conditional else torch.float32
        inputs.append(helper.make_tensor_value_info(model.conditioning, kinds[dtype], shape[:1]))
    output = helper.make_tensor_value_info("f", kinds[torch.float32], shape)
    weights = [initializer(name, tensor) for name, tensor in graph.constants.items()]
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(
        helper.make_graph(nodes, model.config.arch, inputs, [output], weights),
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="ncsn_fast",
        producer_version=package_version("ncsn_fast"),
    )


def package_version(name: str) -> str:
    """Returns the version of an installed distribution, or "unknown"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        return "unknown"
