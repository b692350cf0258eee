"""Damaged ONNX files, given to the engine that runs exported ones."""

from __future__ import annotations

import functools
import random
from typing import Any

import harness
import mutations
import tiny

from ncsn_fast import EngineError, ScoreModel
from ncsn_fast.engines.onnx.model import graph_digest, make_onnx, read_onnx

STRINGS = ("", "x", "Loop", "If", "Conv", "com.microsoft", "sigmas", "model", "fp32", "ä")
INTEGERS = (0, 1, -1, 2, 7, 8, 99, 2**31 - 1, 2**62, -(2**63))


@functools.cache
def _model() -> ScoreModel:
    return tiny.model()


@functools.cache
def corpus() -> tuple[bytes, ...]:
    """Returns sound files, of open and of fixed shapes."""
    sizes: tuple[dict[str, Any], ...] = ({}, {"batch": 2, "size": (8, 8)}, {"opset": 22})
    return tuple(make_onnx(_model(), **size) for size in sizes)


def mutate(seed: int) -> bytes:
    """Makes a damaged file."""
    import onnx

    draw = random.Random(seed)
    content = draw.choice(corpus())
    if draw.random() < 0.4:
        return mutations.damaged(content, draw)
    proto = onnx.ModelProto.FromString(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        _change(proto, draw)
    return proto.SerializeToString()


def _change(message: Any, draw: random.Random) -> None:
    """Changes one field somewhere below a message."""
    field = draw.choice(message.DESCRIPTOR.fields)
    present = [found for found, _ in message.ListFields()]
    if present and draw.random() < 0.9:
        field = draw.choice(present)
    value, repeated = getattr(message, field.name), field.is_repeated
    if field.message_type is not None:
        below = value[draw.randrange(len(value))] if repeated and len(value) else value
        if repeated and (not len(value) or draw.random() < 0.15):
            value.add() if draw.random() < 0.5 or not len(value) else value.pop()
        elif draw.random() < 0.05:
            message.ClearField(field.name)
        else:
            _change(below, draw)
        return
    new = _value(field, draw)
    if not repeated:
        setattr(message, field.name, new)
    elif len(value) and draw.random() < 0.7:
        value[draw.randrange(len(value))] = new
    else:
        value.append(new)


def _value(field: Any, draw: random.Random) -> Any:
    """Draws a value of a field's type."""
    if field.cpp_type == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return draw.randbytes(draw.choice((0, 1, 4, 64)))
        return draw.choice(STRINGS)
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return draw.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
    if field.cpp_type == field.CPPTYPE_ENUM:
        return draw.choice([entry.number for entry in field.enum_type.values])
    wide = field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64)
    value = draw.choice(INTEGERS) if wide else draw.choice(INTEGERS) % 2**31
    return abs(value) if field.cpp_type == field.CPPTYPE_UINT64 else value


def check(content: bytes) -> dict[str, bool]:
    """Reads one file; what is taken is what make_onnx writes."""
    path = harness.folder() / "model.onnx"
    path.write_bytes(content)

    def read() -> None:
        if graph_digest(read_onnx(path, _model(), "fp32")) not in _digests():
            raise ArithmeticError("a graph that make_onnx does not write")

    return {"ort": harness.reads("ort", read, (EngineError,), path.name)}


@functools.cache
def _digests() -> frozenset[str]:
    models: list[bytes] = [
        make_onnx(_model(), batch=batch, opset=opset, size=size)
        for opset in range(20, 24) for batch, size in ((None, None), (2, (8, 8)), (None, (8, 8)))
    ]  # fmt: skip
    return frozenset(map(graph_digest, models))
