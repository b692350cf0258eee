"""Pointwise ATen operations in ONNX's."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.onnx.translation import Translation, handles, name_of
from ncsn_fast.engines.onnx.writer import Value

_UNARY = {
    "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos",
    "abs": "Abs", "tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu", "reciprocal": "Reciprocal",
    "round": "Round", "floor": "Floor", "softplus": "Softplus", "asinh": "Asinh",
    "arcsinh": "Asinh", "mish": "Mish", "erf": "Erf", "sign": "Sign", "ceil": "Ceil",
}  # fmt: skip
_BINARY = {
    "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min", "pow": "Pow",
}  # fmt: skip
_COMPARISONS = {
    "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less", "eq": "Equal",
}  # fmt: skip


@handles(*_UNARY)
def _unary(t: Translation, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    if _UNARY[name_of(node)] == "Asinh" and x.dtype is torch.float64:  # which runtimes lack
        root = t.w.op("Sqrt", t.w.op("Add", *t.same(t.w.op("Mul", x, x), 1.0)))
        return t.w.op("Log", t.w.op("Add", x, root))
    return t.w.op(_UNARY[name_of(node)], x)


@handles(*_BINARY)
def _binary(t: Translation, node: fx.Node, a: Any, b: Any, **options: Any) -> Value:
    if options.get("rounding_mode") is not None:
        raise UnsupportedNetwork("division that rounds, which has no ONNX translation")
    return t.w.op(_BINARY[name_of(node)], *t.same(a, b))


@handles("add", "sub", "rsub")
def _sum(t: Translation, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> Value:
    if name_of(node) == "rsub":
        a, b = b, a
        assert alpha == 1
    a, b = t.same(a, b)
    if alpha != 1:
        b = t.w.op("Mul", *t.same(b, alpha))
    return t.w.op("Add" if name_of(node) == "add" else "Sub", a, b)


@handles(*_COMPARISONS)
def _comparison(t: Translation, node: fx.Node, a: Any, b: Any) -> Value:
    return t.w.op(_COMPARISONS[name_of(node)], *t.same(a, b), dtype=torch.bool)


@handles("where")
def _where(t: Translation, node: fx.Node, condition: Value, a: Any, b: Any) -> Value:
    a, b = t.same(a, b)
    return t.w.op("Where", condition, a, b, dtype=a.dtype)


@handles("silu")
def _silu(t: Translation, node: fx.Node, x: Value) -> Value:
    return t.w.op("Mul", x, t.w.op("Sigmoid", x))


@handles("elu")
def _elu(
    t: Translation, node: fx.Node, x: Value, alpha: float = 1.0, scale: float = 1.0,
    input_scale: float = 1.0,
) -> Value:  # fmt: skip
    if input_scale != 1:
        raise UnsupportedNetwork("ELU with a scale of its input, which has no ONNX translation")
    y = t.w.op("Elu", x, alpha=float(alpha))
    return y if scale == 1 else t.w.op("Mul", *t.same(y, float(scale)))


@handles("leaky_relu")
def _leaky(t: Translation, node: fx.Node, x: Value, slope: float = 0.01) -> Value:
    return t.w.op("LeakyRelu", x, alpha=float(slope))


@handles("prelu")
def _prelu(t: Translation, node: fx.Node, x: Value, slope: Value) -> Value:
    slopes = slope if t.rank(node) < 2 else t.reshape(slope, [-1, *[1] * (t.rank(node) - 2)])
    return t.w.op("PRelu", *t.same(x, slopes))


@handles("log_sigmoid")
def _log_sigmoid(t: Translation, node: fx.Node, x: Value) -> Value:
    return t.w.op("Neg", t.w.op("Softplus", t.w.op("Neg", x)))


@handles("gelu")
def _gelu(t: Translation, node: fx.Node, x: Value, approximate: str = "none") -> Value:
    return t.w.op("Gelu", x, approximate=approximate)


@handles("zeros_like", "ones_like", "full_like")
def _filled(t: Translation, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    number = {"zeros_like": 0.0, "ones_like": 1.0}.get(name_of(node), rest[0] if rest else 0.0)
    value = t.w.cast(t.w.scalar(float(number)), x.dtype)
    return t.w.op("Expand", value, t.w.op("Shape", x, dtype=torch.int64), dtype=x.dtype)


@handles("zeros", "ones", "full")
def _made(t: Translation, node: fx.Node, size: Any, *rest: Any, **options: Any) -> Value:
    kind = node.meta["val"].dtype
    kind = torch.float32 if kind.is_floating_point else torch.int64
    number = {"zeros": 0, "ones": 1}.get(name_of(node), rest[0] if rest else 0)
    return t.w.op("Expand", t.number(number, kind), t.sizes(t.shape(node)), dtype=kind)


@handles("square")
def _square(t: Translation, node: fx.Node, x: Value) -> Value:
    return t.w.op("Mul", x, x)


@handles("rsqrt")
def _rsqrt(t: Translation, node: fx.Node, x: Value) -> Value:
    return t.w.op("Reciprocal", t.w.op("Sqrt", x))


@handles("log1p", "expm1")
def _near_one(t: Translation, node: fx.Node, x: Value) -> Value:
    """log1p(x) = 2 artanh(x / (2 + x)) and expm1(x) = 2 tanh(x / 2) / (1 - tanh(x / 2)), near 0."""
    _, one, two = t.same(x, 1.0, 2.0)
    if x.dtype is torch.float64:  # whose cancellation does not show in float32
        if name_of(node) == "log1p":
            return t.w.op("Log", t.w.op("Add", x, one))
        return t.w.op("Sub", t.w.op("Exp", x), one)
    if name_of(node) == "log1p":
        near = t.w.op("Mul", t.w.op("Atanh", t.w.op("Div", x, t.w.op("Add", x, two))), two)
        far = t.w.op("Log", t.w.op("Add", x, one))
    else:
        half = t.w.op("Tanh", t.w.op("Div", x, two))
        near = t.w.op("Div", t.w.op("Mul", half, two), t.w.op("Sub", one, half))
        far = t.w.op("Sub", t.w.op("Exp", x), one)
    below = t.w.op("Less", t.w.op("Abs", x), one, dtype=torch.bool)
    return t.w.op("Where", below, near, far, dtype=x.dtype)


@handles("clamp", "hardtanh")
def _clamp(
    t: Translation, node: fx.Node, x: Value, least: Any = None, most: Any = None, **options: Any
) -> Value:
    least, most = options.get("min", least), options.get("max", most)
    for kind, bound in (("Max", least), ("Min", most)):
        if bound is not None:
            x = t.w.op(kind, *t.same(x, bound))
    return x


@handles(
    "clone", "contiguous", "alias", "detach", "dropout", "feature_dropout", "lift_fresh_copy",
    "_assert_tensor_metadata",
)  # fmt: skip
def _same(t: Translation, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    return x


@handles("to", "_to_copy", "type_as", "float")
def _cast(t: Translation, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    wanted = node.meta["val"].dtype
    if wanted is torch.float64 and t.w.wide and t.exported.depends(node) != "map":
        return t.w.cast(x, torch.float64)
    if wanted.is_floating_point:  # the type of maps is the writer's choice
        kept = x.dtype.is_floating_point and x.dtype is not torch.float64
        return x if kept else t.w.fp32(x)
    return t.w.cast(x, torch.bool if wanted is torch.bool else torch.int64)
