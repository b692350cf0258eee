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
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.data import limits
from ncsn_fast.data.files import open_regular
from ncsn_fast.engines import reference_check
from ncsn_fast.engines.base import DTYPES, EngineError
from ncsn_fast.engines.onnx.network import write
from ncsn_fast.engines.onnx.writer import CONSTANTS, Writer
from ncsn_fast.models.adapter import ParameterisedConfig
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops.noise import check_integer

LIMIT = 2**31 - 2**24  # bytes of weights: the limit of protobuf, less room for the nodes
OPSETS = range(20, 24)
FIRST_OPSET = {"fp32": 20, "fp16": 20, "bf16": 22}  # before 22, convolutions have no bfloat16
_KINDS = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}
_MOST_NODES = 2**24  # bytes of a file beside the weights
_IDENTITY = ("model", "config", "dtype")  # metadata that every file of ours has


def make_onnx(
    model: ScoreModel,
    *,
    dtype: str = "fp32",
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    opset: int | None = None,
    wide: bool = True,
) -> bytes:
    """Returns the network's raw output f as an ONNX model, checked by onnx.checker.

    Inputs are "x" (N, C, H, W) float32 and, for networks conditioned on it, the noise level "sigma"
    (N,) float32; for those with classes "labels" (N,) int64, where n_classes means no class. The
    output is "f" (N, C, H, W) float32.

    Args:
        dtype: "fp32", "fp16" or "bf16": dtype of feature maps and convolutions.
        batch: N; None for dynamic.   size: (H, W); None for dynamic.
        opset: version of the operators; None for the oldest that supports the dtype.
        wide: compute the time of networks that see one in float64. TensorRT has no such type.

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
        height, width = (check_integer("size", n, least=1) for n in size)
        size = height, width
    if batch is not None or size is not None:
        shape = (batch or 1, model.config.channels, *(size or model.config.image_size))
        limits.BATCH_ELEMENTS.check(math.prod(shape), f"the shape {'x'.join(map(str, shape))}")
    if size is not None:
        model.check_input(torch.empty(1, model.config.channels, *size, device="meta"))
    if isinstance(model.config, ParameterisedConfig):
        if size not in (None, model.config.image_size):
            raise ValueError(f"this network has one size, {model.config.image_size}")
        size = model.config.image_size
    graph = write(model, DTYPES[dtype], batch, size, wide=wide)
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
    raw = model.conditional and not isinstance(model.config, ParameterisedConfig)
    own = "1" if raw else "1 / sigma"
    return {
        "model": model.digest(),
        "config": json.dumps(model.config.to_dict(), sort_keys=True),
        "sigmas": json.dumps(model.sigmas.tolist()),
        "data_range": "[0, 1]" if model.bounded else "any",
        "conditioning": "sigma" if reference_check.takes_sigma(model) else "none",
        "score": f"f * {own}",
        "dtype": dtype,
        **{name: package_version(name) for name in ("ncsn_fast", "torch", "onnx")},
    }


def read_onnx(path: str | Path, model: ScoreModel, dtype: str) -> bytes:
    """Reads a file that `make_onnx` wrote for this very model and dtype.

    The file must hold, node for node and weight for weight, what make_onnx writes of the model for
    the file's shape and opset. So no graph of anyone else's reaches ONNX Runtime, which may crash
    on one, run for ever, or ask for any amount of memory.

    Raises:
        EngineError: it was not written by make_onnx, or holds another model, dtype or graph.
    """
    path = Path(path).expanduser()
    again = "write it anew with `python -m ncsn_fast.export`"
    if not path.is_file():
        raise EngineError(f"{path}: there is no such file; {again}")
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    if path.stat().st_size > min(LIMIT, weights + _MOST_NODES):
        raise EngineError(f"{path} has more bytes than this model takes as ONNX; {again}")
    try:
        with open_regular(path, limits.WEIGHTS_BYTES) as file:
            content = file.read()
        found, batch, size, opset = _declared(content)
    except Exception as error:  # damaged bytes make protobuf raise several kinds
        raise EngineError(f"{path} is no ONNX file, or half of one; {again}") from error
    if any(key not in found for key in _IDENTITY):
        raise EngineError(f"{path} was not written by ncsn_fast; {again}")
    if found["model"] != model.digest():
        raise EngineError(f"{path} holds another model than the one given; {again}")
    if found["dtype"] != dtype:
        raise EngineError(f"{path} computes in {found['dtype']}; pass dtype={found['dtype']!r}")
    try:
        own = make_onnx(model, dtype=dtype, batch=batch, size=size, opset=opset)
    except ValueError as error:
        raise EngineError(f"{path}: {error}; {again}") from error
    if graph_digest(content) != graph_digest(own):
        raise EngineError(
            f"{path} does not hold the graph that ncsn_fast {package_version('ncsn_fast')} writes "
            f"for this model (it says that it is of {found.get('ncsn_fast')}); {again}"
        )
    return own


def _declared(
    content: bytes,
) -> tuple[dict[str, str], int | None, tuple[int, int] | None, int | None]:
    """Meta data, batch, (height, width) and opset of an ONNX file; None for what is open."""
    import onnx

    proto = onnx.ModelProto.FromString(content)
    found = {entry.key: entry.value for entry in proto.metadata_props}
    shapes = [entry.type.tensor_type.shape.dim for entry in proto.graph.input]
    dims = [d.dim_value if d.HasField("dim_value") else None for d in shapes[0]] if shapes else []
    batch, _, height, width = dims if len(dims) == 4 else [None] * 4
    size = None if height is None or width is None else (height, width)
    opset = proto.opset_import[0].version if proto.opset_import else None
    return found, batch, size, opset


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
            node.kind, node.inputs, node.outputs, name=node.name,
            **{key: plain(value) for key, value in node.attributes.items()},
        )
        for node in graph.nodes
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", kinds[torch.float32], shape)]
    more = [("sigma", torch.float32)] if reference_check.takes_sigma(model) else []
    more += [("labels", torch.int64)] if model.n_classes else []
    for name, dtype in more:
        inputs.append(helper.make_tensor_value_info(name, kinds[dtype], shape[:1]))
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
