"""Lower bound of a network's time: its convolutions alone.

Weights are packed in advance for oneDNN and maps are channels-last. A network that uses the same
convolutions cannot be faster; the difference is the cost of its other operations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from race import Absent, relative_error
from torch import Tensor, nn

from ncsn_fast import ScoreModel, ops
from ncsn_fast.engines.cpu import onednn
from ncsn_fast.inference.cost import network_flop


def check_dtype(dtype: torch.dtype) -> None:
    """Raises Absent, with the reason, if oneDNN does not convolve in a dtype on this machine."""
    problem = onednn.lacks(dtype)
    if problem is not None:
        raise Absent(problem)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Convolution layer: its name in the model, the input it is timed on, and the packed call."""

    name: str
    x: Tensor
    run: Callable[[], Tensor]


class Floor:
    """All convolutions of one forward, in order."""

    def __init__(self, model: ScoreModel, x: Tensor, dtype: torch.dtype) -> None:
        inputs: dict[tuple[int, ...], Tensor] = {}
        generator = torch.Generator().manual_seed(2)

        def map_like(shape: tuple[int, ...]) -> Tensor:
            """Returns one random map per shape, which is as warm in cache as a network's maps."""
            if shape not in inputs:
                values = torch.randn(shape, generator=generator).to(dtype)
                inputs[shape] = values.contiguous(memory_format=torch.channels_last)
            return inputs[shape]

        self.convolutions = [
            _pack(name, _layer(model, name), map_like(shape)) for name, shape in _calls(model, x)
        ]

    def __call__(self) -> None:
        with torch.inference_mode():
            for convolution in self.convolutions:
                convolution.run()

    def error(self, model: ScoreModel) -> float:
        """Returns the largest relative error of a convolution against the model's, in float32.

        Infinite if some of the model's convolutions are missing (their FLOP do not add up to its
        FLOP).
        """
        worst, flop, n = 0.0, 0, 0
        with torch.inference_mode():
            for call in self.convolutions:
                layer = _layer(model, call.name)
                expected = layer(call.x.float())
                worst = max(worst, relative_error(call.run(), expected))
                n = len(expected)
                flop += 2 * layer.weight.numel() * expected.numel() // layer.out_channels
        return worst if flop == n * network_flop(model) else float("inf")


def packed(dtype: torch.dtype) -> Callable[[ScoreModel, Tensor], Floor]:
    """Returns a builder of the convolutions in a dtype."""
    return functools.partial(Floor, dtype=dtype)


def _layer(model: ScoreModel, name: str) -> nn.Conv2d:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    return layer


def _calls(model: ScoreModel, x: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the convolutions that a forward runs: name, and shape of its input."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str, layer: Any, arguments: tuple[Tensor]) -> None:
        found.append((name, tuple(arguments[0].shape)))

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    handles = [
        layer.register_forward_pre_hook(functools.partial(note, name))
        for name, layer in layers.items()
    ]
    try:
        with torch.inference_mode(), ops.backend("reference"):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _pack(name: str, layer: nn.Conv2d, x: Tensor) -> Convolution:
    check_dtype(x.dtype)
    mkldnn = torch.ops.mkldnn
    window = (list(layer.padding), list(layer.stride), list(layer.dilation), 1)
    weight = mkldnn._reorder_convolution_weight(layer.weight.to(x.dtype), *window, list(x.shape))
    bias = None if layer.bias is None else layer.bias.to(x.dtype)

    def run() -> Tensor:
        return mkldnn._convolution_pointwise(x, weight, bias, *window, "none", [], "")

    return Convolution(name, x, run)
