"""GPU kernels of a plan, in Triton or CUDA C++.

Signatures match `ncsn_fast.kernels`: channels-last maps, buffers given, nothing allocated. For
tests, the same plan also runs on the CPU: convolutions and pointwise passes in plain PyTorch with
norm and update in the extension ("cuda"), or everything in Triton's interpreter ("triton").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.engines.lowering.graph import ConvolutionSpec
from ncsn_fast.ops import backends, native, reference
from ncsn_fast.ops.activations import ACTIVATIONS

FAMILIES = ("triton", "cuda")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A function for each kind of operation, and for a row of a sampler's table."""

    convolution: Callable[[Tensor, Tensor, ConvolutionSpec, Tensor], object]
    new_partials: Callable[[Tensor], Tensor]
    instance_norm_plus: Callable[..., object]
    group_norm: Callable[..., object]
    scale_shift: Callable[..., object]
    pointwise: Callable[..., object]
    max_pool5: Callable[..., object]
    avg_pool5: Callable[..., object]
    mean_pool2: Callable[..., object]
    resize_add: Callable[..., object]
    sampler_update_: Callable[..., object]
    advance: Callable[[Any], object]
    precision: str = "ieee"  # of float32 convolutions, or "tf32"


def problem(device_type: str = "cuda") -> str | None:
    """Returns why the kernels cannot run on this device type and what to do; None if they can."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return (
            "torch sees no NVIDIA GPU (torch.cuda.is_available() is False); it needs a GPU, its "
            "driver and a CUDA build of torch"
        )
    if device_type == "cuda" and not torch.backends.cudnn.is_available():
        return "this build of torch has no cuDNN; install one from pypi.org or pytorch.org"
    return backends.missing("triton") or None


def load(family: str, device: torch.device, *, tf32: bool = False, tune: bool = False) -> Kernels:
    """Returns the kernels of a family: "triton", or "cuda" with norms and update in CUDA C++.

    Args:
        tf32: allow float32 convolutions to round their inputs to TF32.
        tune: let cuDNN time its algorithms and take the fastest, which may differ between
            processes; otherwise it takes its deterministic first choice, so that all agree.

    Raises:
        ValueError: unknown family.   RuntimeError: the extension was built without CUDA.
    """
    if family not in FAMILIES:
        raise ValueError(f"kernels must be {' or '.join(map(repr, FAMILIES))}; got {family!r}")
    if device.type == "cpu" and family == "cuda":
        return _emulated()
    if family == "cuda" and backends.missing("cuda"):
        raise RuntimeError(f"kernels='cuda': {backends.missing('cuda')}; or use kernels='triton'")
    kernels = _triton(_convolution if device.type == "cpu" else _cudnn(tf32=tf32, tune=tune))
    kernels = dataclasses.replace(kernels, precision="tf32" if tf32 else "ieee")
    if family == "triton":
        return kernels
    return dataclasses.replace(
        kernels,
        new_partials=native.new_partials,
        instance_norm_plus=native.instance_norm_plus,
        group_norm=native.group_norm,
        sampler_update_=native.sampler_update_,
        advance=native.advance,
    )


def _triton(convolution: Callable[[Tensor, Tensor, ConvolutionSpec, Tensor], object]) -> Kernels:
    from ncsn_fast.kernels import add_elu, mean_pool2, norm_statistics, pool5, resize_add
    from ncsn_fast.kernels import group_norm as group
    from ncsn_fast.kernels import instance_norm_plus as norm
    from ncsn_fast.kernels import sampler_update as update

    return Kernels(
        convolution=convolution,
        new_partials=norm_statistics.new_partials,
        instance_norm_plus=norm.instance_norm_plus,
        group_norm=group.group_norm,
        scale_shift=group.scale_shift,
        pointwise=add_elu.pointwise,
        max_pool5=pool5.max_pool5,
        avg_pool5=pool5.avg_pool5,
        mean_pool2=mean_pool2.mean_pool2,
        resize_add=resize_add.resize_add,
        sampler_update_=update.sampler_update_,
        advance=update.advance,
    )


def _cudnn(
    *, tf32: bool, tune: bool
) -> Callable[[Tensor, Tensor, ConvolutionSpec, Tensor], object]:
    run = torch.ops.aten.cudnn_convolution.out

    def convolution(x: Tensor, weight: Tensor, spec: ConvolutionSpec, out: Tensor) -> None:
        padding, stride, dilation = ([n] * 2 for n in (spec.padding, spec.stride, spec.dilation))
        run(x, weight, padding, stride, dilation, 1, tune, not tune, tf32, out=out)

    return convolution


def _convolution(x: Tensor, weight: Tensor, spec: ConvolutionSpec, out: Tensor) -> None:
    """Runs a convolution on the CPU."""
    y = torch.nn.functional.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation)
    out.copy_(y)


def _emulated() -> Kernels:
    def writing(function: Callable[..., Tensor]) -> Callable[..., None]:
        return lambda x, *more, out: out.copy_(function(x, *more))

    return Kernels(
        convolution=_convolution,
        new_partials=native.new_partials,
        instance_norm_plus=native.instance_norm_plus,
        group_norm=native.group_norm,
        scale_shift=_scale_shift,
        pointwise=_pointwise,
        max_pool5=writing(reference.max_pool5),
        avg_pool5=writing(reference.avg_pool5),
        mean_pool2=writing(reference.mean_pool2),
        resize_add=writing(reference.resize_add),
        sampler_update_=native.sampler_update_,
        advance=native.advance,
    )


def _scale_shift(x: Tensor, coefficients: Tensor, activation: str, *, out: Tensor) -> None:
    """Computes activation((x - mean) scale + shift), with coefficients (N, 3, C)."""
    mean, scale, shift = coefficients[:, :, :, None, None].unbind(1)
    out.copy_(ACTIVATIONS[activation].function((x - mean) * scale + shift))


def _pointwise(
    terms: Sequence[Tensor],
    bias: Tensor | None,
    total: Tensor | None,
    out: Tensor | None,
    activation: str,
    weights: Sequence[float] = (),
) -> None:
    """Computes total = the sum of the terms and a bias per channel, and out = activation(total)."""
    factors = weights or (1.0,) * len(terms)
    first, *rest = (w * x.float() for w, x in zip(factors, terms, strict=True))
    s = sum(rest, first)
    s = s if bias is None else s + bias[:, None, None]
    if total is not None:
        total.copy_(s)
    if out is not None:
        out.copy_(ACTIVATIONS[activation].function(s))
