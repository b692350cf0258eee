"""Checks of what callers give a model: states, noise levels, labels, networks."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ncsn_fast.models.classes import Described, require_labels


class Model(Protocol):
    """Properties of a ScoreModel that the checks read."""

    net: nn.Module

    @property
    def config(self) -> Described:
        """Description of the model."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the state of one sample."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as callers see it."""

    def check_input(self, u: Tensor) -> None:
        """Raises ValueError unless u is a batch of states that the network accepts."""


def check_network(net: Any) -> nn.Module:
    """Returns a network of the user; TypeError unless it is a module, and not its class."""
    if isinstance(net, type) and issubclass(net, nn.Module):
        raise TypeError(f"net must be a network, and is a class: build it, net={net.__name__}(...)")
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module; got {type(net).__name__}")
    return net


def check_floating(x: Any) -> None:
    """Raises TypeError unless x is a tensor of floating-point numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}: convert it, torch.tensor(x)")
    if not x.is_floating_point():
        raise TypeError(
            f"x must be floating point, samples and their noise; got {x.dtype}: convert it, and "
            "divide images of 0 to 255 by 255"
        )


def check_states(model: Model, x: Any) -> None:
    """Raises TypeError or ValueError unless x (N, C, H, W) are states that the model may be of."""
    check_floating(x)
    channels = model.image_shape[0]
    if len(model.sample_shape) != 3:
        model.check_input(x)
    elif x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"expected images (N, {channels}, H, W); got {tuple(x.shape)}")


def check_call(model: Model, x: Any, labels: Any = None) -> None:
    """Raises TypeError or ValueError unless the network can be called with states and labels."""
    check_states(model, x)
    check_labels(model.config, labels, len(x))
    weight = next((p for p in model.net.parameters() if p.is_floating_point()), None)
    if weight is None:
        return
    if x.device != weight.device:
        raise ValueError(
            f"x is on {x.device}, and the network on {weight.device}: move one of them with .to()"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"x must be of the network's dtype, {weight.dtype}; got {x.dtype}: convert it, "
            f"x.to({weight.dtype})"
        )


def check_labels(config: Described, labels: Any, n: int) -> None:
    """Raises TypeError or ValueError unless labels are None or (n,) that the network takes.

    The label n_classes means no class.
    """
    require_labels(config, labels)
    if labels is None:
        return
    if config.n_classes == 0:
        raise ValueError("this model has no classes, so labels say nothing to it: leave them out")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor ({n},) of torch.int64; got {got}")
    if labels.shape != (n,):
        raise ValueError(f"labels must be ({n},), one for each image; got {tuple(labels.shape)}")


def each_sigma(sigma: Tensor | float, x: Tensor) -> Tensor:
    """Broadcasts sigma, a number or one per sample, to noise levels (N,) float32 for x (N, ...).

    TypeError or ValueError unless they are numbers, positive and finite.
    """
    try:
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"sigma must be a number or a tensor ({len(x)},); got {sigma!r}") from error
    if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) != len(x)):
        raise ValueError(f"sigma must be a number or ({len(x)},); got shape {tuple(sigma.shape)}")
    if not bool(((sigma > 0) & torch.isfinite(sigma)).all()):
        raise ValueError(f"sigma must be positive and finite; got {sigma.tolist()}")
    return sigma.expand(len(x))
