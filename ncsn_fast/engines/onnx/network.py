"""ONNX graphs of models: any network that torch.export takes, in standard operators.

Inputs are images, and the noise level itself where the network is conditioned on it: its time,
level or embedding is computed in the graph.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ncsn_fast.engines.lowering.export import PROBE, Exported
from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.lowering.remembered import Remembered, tensors_of
from ncsn_fast.engines.onnx import stored
from ncsn_fast.engines.onnx.aten import export, translate
from ncsn_fast.engines.onnx.writer import Value, Writer
from ncsn_fast.engines.reference_check import takes_sigma
from ncsn_fast.models.architectures import size_rule
from ncsn_fast.models.score import ModelConfig, ScoreModel


class RawOutput(nn.Module):
    """The raw output of a network as a network of x (N, C, H, W) and, maybe, sigma (N,).

    NCSN (2019) takes the level nearest in log sigma, as ScoreModel.nearest_level says, and the
    tutorial's U-Net the time. Both are computed in float32.
    """

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.net, self.known = model.net, model.parameterisation

    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        seen = None if sigma is None else self.known.condition(sigma, x.dtype)
        return self.net(x, seen)


class ScaledScore(nn.Module):
    """sigma * score as a network of x (N, C, H, W), sigma (N,) and, with classes, labels (N,).

    All of it is computed in float32, but for a `wide` time: networks compute phases of hundreds of
    radians from it, which its last bit moves by 1e-4.
    """

    def __init__(self, model: ScoreModel, *, wide: bool = False) -> None:
        super().__init__()
        self.net, self.known = model.net, model.parameterisation
        self.seen_dtype = torch.float64 if wide else torch.float32

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        form = self.known.linear_form(sigma, x.dtype)
        skip, out, const, scale, shift = (c.view(-1, 1, 1, 1) for c in form)
        condition = self.known.condition(sigma, self.seen_dtype)
        more = () if labels is None else (labels,)
        f = self.net(scale * x + shift, condition, *more)
        return skip * x + out * f + const


# Exported networks by stored.key, without weights. They serve all dtypes and sizes.
_exports: dict[str, Exported] = {}
# Those of users, by whether they compute a wide time, and the number of images.
_Known = dict[tuple[bool, int], Remembered[Exported]]
_users: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def write(
    model: ScoreModel,
    dtype: torch.dtype,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    *,
    wide: bool = False,
) -> Writer:
    """Writes the graph of a model: "x" float32, maybe "sigma" float32 and "labels" int64 -> "f".

    f is the raw output of networks with a ModelConfig, and sigma * score of others.

    Args:
        batch: N; None for any.
        size: (H, W); None for all that a network with a ModelConfig takes. Others have one.
        wide: compute the time of a network with another config in float64.

    Raises:
        UnsupportedNetwork: torch cannot export the network, or an operation has no translation.
    """
    wide = wide and model.conditioning == "time" and not isinstance(model.config, ModelConfig)
    key = stored.key(model, dtype, batch, size)
    found = None if key is None else stored.find(key, model, dtype)
    if found is None:
        found = _written(model, dtype, batch, size, wide)
        if key is not None:
            stored.keep(key, found)
    return found


def refusal(model: ScoreModel, *, wide: bool, any_number: bool) -> str | None:
    """Returns what of a user's network has no place in a graph; None if it is written.

    Args:
        wide: see `write`.
        any_number: whether the graph has to take any number of images.
    """
    if stored.key(model) is not None:
        return None
    batch = None if any_number else PROBE
    try:
        write(model, torch.float32, batch, model.config.image_size, wide=wide)
    except UnsupportedNetwork as error:
        return f"does not run networks with {error}"
    return None


def _written(
    model: ScoreModel,
    dtype: torch.dtype,
    batch: int | None,
    size: tuple[int, int] | None,
    wide: bool,
) -> Writer:
    if not isinstance(model.config, ModelConfig):
        exported = _of_one_size(model, wide, batch or PROBE)
        if exported.batch is not None and batch is None:
            raise UnsupportedNetwork(
                "a forward that fixes the number of images, as len(x) does where x.shape[0] would "
                "not"
            )
    else:
        exported = _of_any_size(model)
    inputs = [Value("x", torch.float32)]
    if takes_sigma(model):
        inputs.append(Value("sigma", torch.float32))
    if model.n_classes:
        inputs.append(Value("labels", torch.int64))
    height, width = size or (None, None)
    sizes = {0: batch, 2: height, 3: width}
    w = Writer(dtype, wide=wide)
    f = translate(exported, w, inputs, {axis: n for axis, n in sizes.items() if n is not None})
    w.scope = ""
    w.op("Cast", f, name="f", to=torch.float32)
    w.drop_unread("f")
    return w


def _of_any_size(model: ScoreModel) -> Exported:
    """Exports a network with a ModelConfig, unless one of its structure has been exported."""
    assert isinstance(model.config, ModelConfig)
    key = stored.key(model)
    found = None if key is None else _exports.get(key)
    if found is None:
        found = _export(model, RawOutput, PROBE, size_rule(model.config.arch))
        if key is not None:
            _exports[key] = found.without_weights()
    return found.with_weights(model.state_dict())


def _of_one_size(model: ScoreModel, wide: bool, n: int) -> Exported:
    """Exports a network with another config, unless this very one has been exported."""
    known, tensors = _users.setdefault(model.net, {}), [*tensors_of(model)]
    found = known.get((wide, n))
    if found is None or not found.is_of(tensors):
        exported = _export(model, functools.partial(ScaledScore, wide=wide), n)
        found = known[wide, n] = Remembered.of(exported.without_weights(), tensors)
    named = (model.named_parameters, model.named_buffers)
    each = {name: t for of in named for name, t in of(remove_duplicate=False)}
    return found.value.with_weights({
        name: t.detach().to("cpu", torch.float32 if t.is_floating_point() else t.dtype)
        for name, t in each.items()
    })  # fmt: skip


def _export(
    model: ScoreModel,
    kind: Callable[[ScoreModel], nn.Module],
    n: int,
    sizes: tuple[int, int] | None = None,
) -> Exported:
    with torch.inference_mode(mode=False):
        net = kind(copy.deepcopy(model).cpu().float()).eval()
    inputs = [torch.zeros(n, *model.image_shape)]
    inputs += [torch.ones(n)] if takes_sigma(model) else []
    inputs += [torch.zeros(n, dtype=torch.int64)] if model.n_classes else []
    return export(net, inputs, sizes)
