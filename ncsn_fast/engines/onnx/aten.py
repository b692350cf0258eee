"""ATen operations, as torch.export finds them, in ONNX's standard operators.

Convolutions, and matrix products of maps, compute in the writer's dtype; norms, softmax, and what
depends on the noise level alone compute in float32, and pointwise operations in the wider dtype of
their inputs. Sizes are those of the exported network, but for the number of images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ncsn_fast.engines.lowering.export import Exported
from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.onnx.writer import CONSTANTS, NOTHING, Value, Writer

aten = torch.ops.aten
Handler = Callable[..., Any]  # (translation, node, *args of the operation, **kwargs)
_HANDLERS: dict[str, Handler] = {}  # by the operation's name without overload


def translate(exported: Exported, w: Writer, inputs: Sequence[Value]) -> Value:
    """Writes the graph of an exported network; returns its output.

    Raises:
        UnsupportedNetwork: an operation has no translation; the message names it.
    """
    return _Translation(exported, w, inputs).run()


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers the translation of operations."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class _Translation:
    """Values of an exported graph's nodes, written one after the other.

    Arguments of handlers are Values, Python numbers, or lists of them; batch sizes are None.
    """

    def __init__(self, exported: Exported, w: Writer, inputs: Sequence[Value]) -> None:
        self.exported, self.w = exported, w
        self.values: dict[fx.Node, Any] = dict(zip(exported.inputs, inputs, strict=True))

    def run(self) -> Value:
        for node in self.exported.nodes:
            tensor = isinstance(node.meta.get("val"), (Tensor, list, tuple))
            if tensor and self.exported.depends(node) != "constant" and node not in self.values:
                self._write(node)
        return self.value(self.exported.output)

    def _write(self, node: fx.Node) -> None:
        name = _name(node)
        handler = _HANDLERS.get(name)
        path = self.exported.path(node)
        if handler is None:
            inside = f" in {path}" if path else ""
            raise UnsupportedNetwork(f"the operation {name}{inside}, which has no ONNX translation")
        self.w.scope = path
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._argument)
        self.values[node] = handler(self, node, *args, **kwargs)

    def _argument(self, node: fx.Node) -> Any:
        """Returns a node as a handler takes it."""
        kind = self.exported.depends(node)
        if kind == "batch" and not isinstance(node.meta["val"], Tensor):
            return None
        if kind == "constant" and not isinstance(self.exported.constant(node), Tensor):
            return self.exported.constant(node)
        return self.value(node)

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self._constant(node)
        return self.values[node]

    def _constant(self, node: fx.Node) -> Value:
        tensor, name = self.exported.constant(node), self.exported.parameter(node)
        dtype = torch.float32 if tensor.is_floating_point() else torch.int64
        dtype = torch.bool if tensor.dtype is torch.bool else dtype
        name = name or f"{CONSTANTS}{node.name}"
        self.w.constants[name] = tensor.detach().to("cpu", dtype).contiguous()
        return Value(name, dtype)

    def low(self, node: fx.Node, value: Value) -> Value:
        """Casts an input of a product: to the writer's dtype, for products of maps."""
        of_maps = self.exported.depends(node) == "map"
        if self.w.dtype is not torch.float32 and of_maps and value.name in self.w.constants:
            key = f"{value.name} as {self.w.dtype}"  # weights are stored in the type they are used
            self.w.constants[key] = self.w.constants[value.name].to(self.w.dtype)
            return Value(key, self.w.dtype)
        return self.w.low(value) if of_maps else self.w.fp32(value)

    def shape(self, node: fx.Node) -> list[int]:
        """Returns the shape of a node's tensor, with -1 where the number of images counts."""
        return [n if isinstance(n, int) else -1 for n in node.meta["val"].shape]

    def same(self, *values: Value | float | int) -> list[Value]:
        """Casts operands to one dtype, and numbers to constants of it."""
        tensors = [v for v in values if isinstance(v, Value)]
        kinds = {v.dtype for v in tensors}
        floats = [k for k in kinds if k.is_floating_point]
        number = any(isinstance(v, float) for v in values)
        if torch.float32 in floats or (not floats and number):
            kind = torch.float32
        else:
            kind = floats[0] if floats else tensors[0].dtype
        return [self._as(v, kind) for v in values]

    def _as(self, value: Value | float | int, kind: torch.dtype) -> Value:
        if isinstance(value, Value):
            return self.w.cast(value, kind)
        if kind.is_floating_point:
            return self.w.cast(self.w.scalar(float(value)), kind)
        return self.w.index(int(value))

    def sizes(self, shape: Sequence[int]) -> Value:
        """Returns a shape as a vector, with the number of images for -1."""
        if -1 not in shape:
            return self.ints(*shape)
        images = self.w.op("Shape", self.value(self.exported.inputs[0]), dtype=torch.int64, end=1)
        parts = [images if n == -1 else self.ints(n) for n in shape]
        return self.w.op("Concat", *parts, axis=0) if len(parts) > 1 else images

    def ints(self, *numbers: int) -> Value:
        return self.w.ints(*numbers)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        return self.w.op("Reshape", x, self.ints(*shape))

    def rank(self, node: fx.Node) -> int:
        return node.meta["val"].ndim


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).removeprefix("aten.").removesuffix("_")
    return getattr(target, "__name__", str(target))


def _input(node: fx.Node, index: int = 0) -> fx.Node:
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


# Pointwise ----------------------------------------------------------------------------------------

_UNARY = {
    "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos",
    "abs": "Abs", "tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu", "reciprocal": "Reciprocal",
    "round": "Round", "floor": "Floor", "softplus": "Softplus", "asinh": "Asinh",
    "arcsinh": "Asinh", "mish": "Mish", "erf": "Erf",
}  # fmt: skip
_BINARY = {
    "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min", "pow": "Pow",
}  # fmt: skip
_COMPARISONS = {
    "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less", "eq": "Equal",
}  # fmt: skip


@handles(*_UNARY)
def _unary(t: _Translation, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    return t.w.op(_UNARY[_name(node)], x)


@handles(*_BINARY)
def _binary(t: _Translation, node: fx.Node, a: Any, b: Any, **options: Any) -> Value:
    if options.get("rounding_mode") is not None:
        raise UnsupportedNetwork("division that rounds, which has no ONNX translation")
    return t.w.op(_BINARY[_name(node)], *t.same(a, b))


@handles("add", "sub", "rsub")
def _sum(t: _Translation, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> Value:
    if _name(node) == "rsub":
        a, b = b, a
        assert alpha == 1
    a, b = t.same(a, b)
    if alpha != 1:
        b = t.w.op("Mul", *t.same(b, alpha))
    return t.w.op("Add" if _name(node) == "add" else "Sub", a, b)


@handles(*_COMPARISONS)
def _comparison(t: _Translation, node: fx.Node, a: Any, b: Any) -> Value:
    return t.w.op(_COMPARISONS[_name(node)], *t.same(a, b), dtype=torch.bool)


@handles("where")
def _where(t: _Translation, node: fx.Node, condition: Value, a: Any, b: Any) -> Value:
    a, b = t.same(a, b)
    return t.w.op("Where", condition, a, b, dtype=a.dtype)


@handles("silu")
def _silu(t: _Translation, node: fx.Node, x: Value) -> Value:
    return t.w.op("Mul", x, t.w.op("Sigmoid", x))


@handles("elu")
def _elu(t: _Translation, node: fx.Node, x: Value, alpha: float = 1.0, *rest: Any) -> Value:
    return t.w.op("Elu", x, alpha=float(alpha))


@handles("leaky_relu")
def _leaky(t: _Translation, node: fx.Node, x: Value, slope: float = 0.01) -> Value:
    return t.w.op("LeakyRelu", x, alpha=float(slope))


@handles("gelu")
def _gelu(t: _Translation, node: fx.Node, x: Value, approximate: str = "none") -> Value:
    return t.w.op("Gelu", x, approximate=approximate)


@handles("zeros_like", "ones_like", "full_like")
def _filled(t: _Translation, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    number = {"zeros_like": 0.0, "ones_like": 1.0}.get(_name(node), rest[0] if rest else 0.0)
    value = t.w.cast(t.w.scalar(float(number)), x.dtype)
    return t.w.op("Expand", value, t.w.op("Shape", x, dtype=torch.int64), dtype=x.dtype)


@handles("zeros", "ones", "full")
def _made(t: _Translation, node: fx.Node, size: Any, *rest: Any, **options: Any) -> Value:
    kind = node.meta["val"].dtype
    kind = torch.float32 if kind.is_floating_point else torch.int64
    number = {"zeros": 0, "ones": 1}.get(_name(node), rest[0] if rest else 0)
    return t.w.op("Expand", t._as(number, kind), t.sizes(t.shape(node)), dtype=kind)


@handles("square")
def _square(t: _Translation, node: fx.Node, x: Value) -> Value:
    return t.w.op("Mul", x, x)


@handles("rsqrt")
def _rsqrt(t: _Translation, node: fx.Node, x: Value) -> Value:
    return t.w.op("Reciprocal", t.w.op("Sqrt", x))


@handles("log1p", "expm1")
def _near_one(t: _Translation, node: fx.Node, x: Value) -> Value:
    """log1p(x) = 2 artanh(x / (2 + x)) and expm1(x) = 2 tanh(x / 2) / (1 - tanh(x / 2)), near 0."""
    one, two = t.same(1.0, 2.0)
    if _name(node) == "log1p":
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
    t: _Translation, node: fx.Node, x: Value, least: Any = None, most: Any = None, **options: Any
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
def _same(t: _Translation, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    return x


@handles("to", "_to_copy", "type_as", "float")
def _cast(t: _Translation, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    wanted = node.meta["val"].dtype
    if wanted.is_floating_point:  # the type of maps is the writer's choice
        return x if x.dtype.is_floating_point else t.w.fp32(x)
    return t.w.cast(x, torch.bool if wanted is torch.bool else torch.int64)


# Shapes -------------------------------------------------------------------------------------------


@handles(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_copy"
)
def _reshape(t: _Translation, node: fx.Node, x: Value, *rest: Any) -> Value:
    shape = t.shape(node)
    if shape.count(-1) > 1:
        raise UnsupportedNetwork("a shape that has the number of images twice")
    return t.reshape(x, shape)


@handles("permute")
def _permute(t: _Translation, node: fx.Node, x: Value, axes: Sequence[int]) -> Value:
    rank = t.rank(node)
    return t.w.op("Transpose", x, perm=[a % rank for a in axes])


@handles("transpose", "t", "swapaxes", "numpy_T")
def _transpose(t: _Translation, node: fx.Node, x: Value, a: int = 0, b: int = 1) -> Value:
    rank = t.rank(node)
    axes = list(range(rank))
    axes[a % rank], axes[b % rank] = axes[b % rank], axes[a % rank]
    return t.w.op("Transpose", x, perm=axes)


@handles("mT", "adjoint", "matrix_H")
def _transposed_matrix(t: _Translation, node: fx.Node, x: Value) -> Value:
    return _transpose(t, node, x, -1, -2)


@handles("expand", "expand_as")
def _expand(t: _Translation, node: fx.Node, x: Value, *rest: Any) -> Value:
    shape = t.shape(node)
    before = [n if isinstance(n, int) else -1 for n in _input(node).meta["val"].shape]
    if -1 in shape and -1 not in before:
        return t.w.op("Expand", x, t.sizes(shape))
    return t.w.op("Expand", x, t.ints(*(1 if n == -1 else n for n in shape)))


@handles("repeat")
def _repeat(t: _Translation, node: fx.Node, x: Value, times: Sequence[int]) -> Value:
    if len(times) != _input(node).meta["val"].ndim or any(n is None for n in times):
        raise UnsupportedNetwork("repeat with a new axis, which has no ONNX translation")
    return t.w.op("Tile", x, t.ints(*times))


@handles("cat", "concat")
def _cat(t: _Translation, node: fx.Node, parts: Sequence[Value], axis: int = 0) -> Value:
    return t.w.op("Concat", *t.same(*parts), axis=axis % t.rank(node))


@handles("stack")
def _stack(t: _Translation, node: fx.Node, parts: Sequence[Value], axis: int = 0) -> Value:
    axis %= t.rank(node)
    return t.w.op(
        "Concat", *(t.w.op("Unsqueeze", p, t.ints(axis)) for p in t.same(*parts)), axis=axis
    )


def _slices(t: _Translation, x: Value, axis: int, sizes: Sequence[int]) -> list[Value]:
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [
        t.w.op("Slice", x, t.ints(low), t.ints(high), t.ints(axis))
        for low, high in itertools.pairwise(bounds)
    ]


@handles("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
def _split(t: _Translation, node: fx.Node, x: Value, *rest: Any) -> list[Value]:
    values = node.meta["val"]
    axis = (rest[1] if len(rest) > 1 else node.kwargs.get("dim", 0)) % values[0].ndim
    return _slices(t, x, axis, [v.shape[axis] for v in values])


@handles("unbind")
def _unbind(t: _Translation, node: fx.Node, x: Value, axis: int = 0) -> list[Value]:
    axis %= _input(node).meta["val"].ndim
    n = _input(node).meta["val"].shape[axis]
    return [t.w.op("Gather", x, t.w.index(i), axis=axis) for i in range(n)]


@handles("getitem")
def _getitem(t: _Translation, node: fx.Node, parts: Sequence[Value], index: int) -> Value:
    return parts[index]


@handles("select")
def _select(t: _Translation, node: fx.Node, x: Value, axis: int, index: int) -> Value:
    shape = _input(node).meta["val"].shape
    axis %= len(shape)
    return t.w.op("Gather", x, t.w.index(index % shape[axis]), axis=axis)


@handles("slice")
def _slice(
    t: _Translation, node: fx.Node, x: Value, axis: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> Value:  # fmt: skip
    shape = _input(node).meta["val"].shape
    axis %= len(shape)
    if start in (None, 0) and step == 1 and (end is None or end >= 2**31):
        return x
    bounds = (t.ints(start or 0), t.ints(2**31 if end is None else end), t.ints(axis))
    return t.w.op("Slice", x, *bounds, t.ints(step))


@handles("index")
def _index(t: _Translation, node: fx.Node, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        raise UnsupportedNetwork("indexing by several tensors, which has no ONNX translation")
    ((axis, index),) = given
    return t.w.op("Gather", x, index, axis=axis)


@handles("embedding")
def _embedding(t: _Translation, node: fx.Node, weight: Value, index: Value, *rest: Any) -> Value:
    return t.w.op("Gather", weight, index)


# Reductions ---------------------------------------------------------------------------------------


def _axes(node: fx.Node, axes: Any) -> list[int]:
    rank = _input(node).meta["val"].ndim
    if axes is None or axes == []:
        return list(range(rank))
    return [a % rank for a in ([axes] if isinstance(axes, int) else axes)]


@handles("mean", "sum", "amax", "amin")
def _reduce(
    t: _Translation, node: fx.Node, x: Value, axes: Any = None, keep: bool = False, **options: Any
) -> Value:
    kind = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}
    axes, keep = options.get("dim", axes), options.get("keepdim", keep)
    x = t.w.cast(x, torch.int64) if x.dtype is torch.bool else x
    x = t.w.fp32(x) if x.dtype.is_floating_point else x
    return t.w.op(kind[_name(node)], x, t.ints(*_axes(node, axes)), keepdims=int(keep))


@handles("argmin", "argmax")
def _arg(t: _Translation, node: fx.Node, x: Value, axis: int, keep: bool = False) -> Value:
    kind = {"argmin": "ArgMin", "argmax": "ArgMax"}[_name(node)]
    (axis,) = _axes(node, axis)
    return t.w.op(kind, x, axis=axis, keepdims=int(keep), dtype=torch.int64)


@handles("softmax", "_softmax")
def _softmax(t: _Translation, node: fx.Node, x: Value, axis: int, *rest: Any) -> Value:
    return t.w.op("Softmax", t.w.fp32(x), axis=axis % t.rank(node))


# Norms --------------------------------------------------------------------------------------------


def _normalised(w: Writer, x: Value, axes: Sequence[int], eps: float) -> Value:
    """(x - mean) / sqrt(var + eps) over some axes, centred before it is scaled."""
    centred = w.op("Sub", x, w.mean(x, *axes))
    return w.op("Div", centred, w.rooted(w.mean(w.op("Mul", centred, centred), *axes), eps))


def _affine(
    t: _Translation, x: Value, weight: Value | None, bias: Value | None, shape: Sequence[int]
) -> Value:
    for kind, parameter in (("Mul", weight), ("Add", bias)):
        if parameter is not None:
            x = t.w.op(kind, x, t.reshape(t.w.fp32(parameter), shape))
    return x


@handles("group_norm")
def _group_norm(
    t: _Translation, node: fx.Node, x: Value, groups: int, weight: Value | None = None,
    bias: Value | None = None, eps: float = 1e-5, *rest: Any,
) -> Value:  # fmt: skip
    shape = t.shape(node)
    grouped = t.reshape(t.w.fp32(x), [-1, groups, math.prod(shape[1:]) // groups])
    y = t.reshape(_normalised(t.w, grouped, (2,), eps), shape)
    return _affine(t, y, weight, bias, [-1, *[1] * (len(shape) - 2)])


@handles("layer_norm")
def _layer_norm(
    t: _Translation, node: fx.Node, x: Value, sizes: Sequence[int], weight: Value | None = None,
    bias: Value | None = None, eps: float = 1e-5, *rest: Any,
) -> Value:  # fmt: skip
    rank = t.rank(node)
    y = _normalised(t.w, t.w.fp32(x), tuple(range(rank - len(sizes), rank)), eps)
    return _affine(t, y, weight, bias, list(sizes))


@handles("instance_norm")
def _instance_norm(
    t: _Translation, node: fx.Node, x: Value, weight: Value | None, bias: Value | None, *rest: Any
) -> Value:
    shape, eps = t.shape(node), float(rest[4])
    y = _normalised(t.w, t.w.fp32(x), tuple(range(2, len(shape))), eps)
    return _affine(t, y, weight, bias, [-1, *[1] * (len(shape) - 2)])


@handles("batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(
    t: _Translation, node: fx.Node, x: Value, weight: Value, bias: Value, mean: Value,
    variance: Value, *rest: Any,
) -> Value:  # fmt: skip
    if _name(node) == "batch_norm" and rest[0]:
        raise UnsupportedNetwork("batch norm of the batch's own statistics")
    inputs = (t.w.fp32(v) for v in (x, weight, bias, mean, variance))
    return t.w.op("BatchNormalization", *inputs, epsilon=float(rest[2] if len(rest) > 2 else 1e-5))


# Products -----------------------------------------------------------------------------------------


@handles("conv1d", "conv2d", "conv3d")
def _convolution(
    t: _Translation, node: fx.Node, x: Value, weight: Value, bias: Value | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    axes = t.rank(node) - 2
    each = lambda v: _spread([v] if isinstance(v, int) else list(v), axes)  # noqa: E731
    sizes = _input(node, 1).meta["val"].shape[2:]
    dilations = each(dilation)
    if padding == "same":
        reach = [d * (n - 1) for d, n in zip(dilations, sizes, strict=True)]
        pads = [*(n // 2 for n in reach), *(n - n // 2 for n in reach)]
    else:
        pads = 2 * each(0 if padding == "valid" else padding)
    inputs = [t.low(node, v) for v in (x, weight, bias) if v is not None]
    return t.w.op(
        "Conv", *inputs, strides=each(stride), pads=pads, dilations=dilations, group=groups,
    )  # fmt: skip


def _spread(values: list[int], axes: int) -> list[int]:
    return values * axes if len(values) == 1 else values


@handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(
    t: _Translation, node: fx.Node, x: Value, weight: Value, bias: Value | None = None,
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    axes = t.rank(node) - 2
    each = lambda v: _spread([v] if isinstance(v, int) else list(v), axes)  # noqa: E731
    inputs = [t.low(node, v) for v in (x, weight, bias) if v is not None]
    return t.w.op(
        "ConvTranspose", *inputs, strides=each(stride), pads=2 * each(padding),
        output_padding=each(output_padding), dilations=each(dilation), group=groups,
    )  # fmt: skip


@handles("linear")
def _linear(
    t: _Translation, node: fx.Node, x: Value, weight: Value, bias: Value | None = None
) -> Value:
    y = t.w.op("MatMul", t.low(node, x), t.w.op("Transpose", t.low(node, weight), perm=[1, 0]))
    return y if bias is None else t.w.op("Add", y, t.low(node, bias))


@handles("matmul", "bmm", "mm")
def _matmul(t: _Translation, node: fx.Node, a: Value, b: Value) -> Value:
    return t.w.op("MatMul", t.low(node, a), t.low(node, b))


@handles("einsum")
def _einsum(
    t: _Translation, node: fx.Node, equation: str, operands: Sequence[Value], **options: Any
) -> Value:
    return t.w.op("Einsum", *(t.low(node, v) for v in operands), equation=equation.replace(" ", ""))


@handles("addmm", "baddbmm")
def _addmm(
    t: _Translation, node: fx.Node, c: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1
) -> Value:
    y = t.w.op("MatMul", t.low(node, a), t.low(node, b))
    if alpha != 1:
        y = t.w.op("Mul", *t.same(y, float(alpha)))
    if beta == 0:
        return y
    c = t.low(node, c)
    return t.w.op("Add", y, c if beta == 1 else t.w.op("Mul", *t.same(c, float(beta))))


@handles("scaled_dot_product_attention")
def _attention(
    t: _Translation, node: fx.Node, q: Value, k: Value, v: Value, mask: Value | None = None,
    dropout: float = 0.0, causal: bool = False, scale: float | None = None, **options: Any,
) -> Value:  # fmt: skip
    if mask is not None or causal or options.get("enable_gqa"):
        raise UnsupportedNetwork("attention with a mask, which has no ONNX translation")
    rank, width = t.rank(node), _input(node).meta["val"].shape[-1]
    axes = [*range(rank - 2), rank - 1, rank - 2]
    keys = t.w.op("Transpose", t.low(node, k), perm=axes)
    logits = t.w.op("MatMul", t.low(node, q), keys)
    factor = width**-0.5 if scale is None else float(scale)
    weights = t.w.op("Softmax", t.w.op("Mul", *t.same(t.w.fp32(logits), factor)), axis=rank - 1)
    return t.w.op("MatMul", t.low(node, weights), t.low(node, v))


# Resampling ---------------------------------------------------------------------------------------


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else _spread(list(value), 2)


@handles("avg_pool2d", "max_pool2d")
def _pool(
    t: _Translation, node: fx.Node, x: Value, kernel: Any, stride: Any = None, padding: Any = 0,
    *rest: Any, **options: Any,
) -> Value:  # fmt: skip
    common: dict[str, Any] = {
        "kernel_shape": _pair(kernel), "pads": 2 * _pair(padding),
        "strides": _pair(stride if stride not in (None, []) else kernel),
    }  # fmt: skip
    if _name(node) == "max_pool2d":
        ceil = bool(rest[1]) if len(rest) > 1 else options.get("ceil_mode", False)
        dilation = rest[0] if rest else options.get("dilation", 1)
        return t.w.op("MaxPool", x, dilations=_pair(dilation), ceil_mode=int(ceil), **common)
    ceil = bool(rest[0]) if rest else options.get("ceil_mode", False)
    counted = rest[1] if len(rest) > 1 else options.get("count_include_pad", True)
    if (rest[2] if len(rest) > 2 else options.get("divisor_override")) is not None:
        raise UnsupportedNetwork("a pool with a divisor, which has no ONNX translation")
    return t.w.op("AveragePool", x, count_include_pad=int(counted), ceil_mode=int(ceil), **common)


@handles("adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def _adaptive(t: _Translation, node: fx.Node, x: Value, size: Any) -> Value:
    before, after = _input(node).meta["val"].shape[2:], t.shape(node)[2:]
    if any(n % m for n, m in zip(before, after, strict=True)):
        raise UnsupportedNetwork("an adaptive pool of unequal windows")
    window = [n // m for n, m in zip(before, after, strict=True)]
    return t.w.op("AveragePool", x, kernel_shape=window, strides=window)


@handles("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d")
def _resize(t: _Translation, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    shape = t.shape(node)
    before = _input(node).meta["val"].shape
    scales = [float(n / m) for n, m in zip(shape[2:], before[2:], strict=True)]
    name = f"{CONSTANTS}scales_{'_'.join(map(str, scales))}"
    t.w.constants[name] = torch.tensor([1.0, 1.0, *scales])
    value = Value(name, torch.float32)
    if _name(node) == "upsample_bilinear2d":
        aligned = rest[1] if len(rest) > 1 else options.get("align_corners", False)
        mode = "align_corners" if aligned else "half_pixel"
        return t.w.op(
            "Resize", t.w.fp32(x), NOTHING, value, mode="linear",
            coordinate_transformation_mode=mode,
        )  # fmt: skip
    return t.w.op(
        "Resize", x, NOTHING, value, mode="nearest", nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip


@handles("pad", "constant_pad_nd")
def _pad(
    t: _Translation, node: fx.Node, x: Value, pads: Sequence[int], *rest: Any, **options: Any
) -> Value:
    given = options.get("mode", rest[0] if rest and isinstance(rest[0], str) else "constant")
    number = next((v for v in (*rest, options.get("value")) if isinstance(v, (int, float))), 0.0)
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    rank = t.rank(node)
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    value = t.w.cast(t.w.scalar(float(number)), x.dtype)
    return t.w.op("Pad", x, t.ints(*before, *after), value, mode=mode[given])


# Ours ---------------------------------------------------------------------------------------------


@handles("ncsn_fast.instance_norm_plus")
def _instance_norm_plus(
    t: _Translation, node: fx.Node, x: Value, alpha: Value, gamma: Value, beta: Value, elu: bool,
    eps: float,
) -> Value:  # fmt: skip
    """IN++, with parameters (C,) or (N, C)."""
    w, channels = t.w, t.shape(node)[1]
    alpha, gamma, beta = (t.reshape(v, [-1, channels, 1, 1]) for v in (alpha, gamma, beta))
    x = w.fp32(x)
    mean = w.mean(x, 2, 3)
    centred = w.op("Sub", x, mean)
    variance = w.mean(w.op("Mul", centred, centred), 2, 3)
    scale = w.op("Div", gamma, w.rooted(variance, eps))
    apart = w.op("Sub", mean, w.mean(mean, 1))
    squares = w.total(w.op("Mul", apart, apart), 1)
    spread = w.op("Div", squares, w.scalar(float(max(channels - 1, 1))))
    shift = w.op("Mul", w.op("Div", apart, w.rooted(spread, eps)), w.op("Mul", gamma, alpha))
    y = w.op("Add", w.op("Mul", centred, scale), w.op("Add", shift, beta))
    return w.op("Elu", y, alpha=1.0) if elu else y
