"""Fused ops: schemas, fake and autograd rules, and dispatch to a backend.

Each op is specified by the function of the same name in `ncsn_fast.ops.reference`. CPU tensors run
the C++ kernels of `ncsn_fast._C`; CUDA tensors run Triton kernels or the extension (`ops.cuda`).
Common rules:

- float64 always runs the reference: there is no fused float64 kernel.
- Kernels read contiguous and channels-last tensors; other memory formats are copied first.
- Any other dtype, shape or device raises TypeError or ValueError; nothing falls back in silence.
- Inside torch.func transforms (vmap, grad, jacrev) the reference runs; kernels cannot be batched.
- `with backend("reference")` sends everything to the reference; "triton" and "cuda" select one
  kernel family for CUDA tensors. `with isa("avx2")` forces an instruction set of the CPU kernels;
  all of them give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.ops import autograd, checks, cuda, extension, noise, reference
from ncsn_fast.ops.activations import ACTIVATIONS, check_activation
from ncsn_fast.ops.autograd import has_cpu_gradients
from ncsn_fast.ops.backends import backend_name, forced_isa
from ncsn_fast.ops.checks import (
    CUDA_DTYPES,
    UpdateArguments,
    check_group_norm,
    check_norm,
    check_norm_out,
    check_update,
    in_transform,
    is_dense,
    is_unobserved,
    memory_format,
)


def instance_norm_plus(
    x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, *, elu: bool = False, eps: float = 1e-5
) -> Tensor:
    """Applies instance normalisation++ and optionally ELU; see `reference.instance_norm_plus`.

    x is float32, bfloat16, float64, or float16 (CUDA only). Parameters are used in float32, or in
    float64 if x is float64. Differentiable any number of times.
    """
    if in_transform():
        return reference.instance_norm_plus(x, alpha, gamma, beta, elu=elu, eps=eps)
    if is_unobserved(x, alpha, gamma, beta) and (x.is_cpu or x.is_cuda):
        return _norm(x, alpha, gamma, beta, elu, eps)
    return torch.ops.ncsn_fast.instance_norm_plus.default(x, alpha, gamma, beta, elu, eps)


def instance_norm_plus_out(
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    beta: Tensor,
    out: Tensor,
    *,
    elu: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """Applies the CPU kernel into a given buffer, without dispatcher or autograd; for engines.

    x and out are each float32 or bfloat16 and share one layout (contiguous or channels-last). out
    may be x. Returns out.
    """
    check_norm(x, alpha, gamma, beta)
    check_norm_out(x, out)
    extension.instance_norm_plus(x, (alpha, gamma, beta), out, elu, eps, forced_isa.get())
    return out


def group_norm(
    x: Tensor,
    groups: int,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """Applies group normalisation, modulated, and an activation; see `reference.group_norm`.

    x is float32, bfloat16, float64, or float16 (CUDA only). Parameters are used in float32, or in
    float64 if x is float64. Differentiable any number of times.
    """
    rows = (gamma, beta, add, scale, shift)
    if in_transform():
        return reference.group_norm(
            x, groups, gamma, beta, add=add, scale=scale, shift=shift, activation=activation,
            eps=eps,
        )  # fmt: skip
    if is_unobserved(x, *(t for t in rows if t is not None)) and (x.is_cpu or x.is_cuda):
        return _group_norm(x, groups, *rows, activation, eps)
    return torch.ops.ncsn_fast.group_norm.default(x, groups, *rows, activation, eps)


def activation(x: Tensor, name: str) -> Tensor:
    """Applies an activation of `ops.activations` to x, of any shape and floating-point dtype.

    On the CPU a gradient of float32 and bfloat16 comes from kernels: PyTorch's exponential of a
    bfloat16 takes as long as a convolution. Elsewhere, and where no gradient is wanted, this is
    PyTorch's function, which exporters and compilers know.

    Raises:
        ValueError: there is no such activation.
    """
    check_activation(name)
    if trains_by_kernels(x):
        return torch.ops.ncsn_fast.activation.default(x, name)
    return ACTIVATIONS[name].function(x)


def trains_by_kernels(x: Tensor) -> bool:
    """Returns whether x's gradient is wanted, and kernels of the CPU are faster at it than PyTorch.

    Not where a compiler, an exporter or a transform of torch.func looks on.
    """
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and has_cpu_gradients(x)
        and not torch.compiler.is_compiling()
        and not in_transform()
    )


def sampler_update_(
    x: Tensor,
    f: Tensor,
    h: Tensor | None,
    coefficients: Sequence[float],
    *,
    seed: int,
    samples: Tensor,
    step: int,
    noise_weights: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    c_ref: float = math.nan,
    ref_step: int = 0,
    net_input: Tensor | None = None,
    scale: float = 2.0,
    shift: float = -1.0,
    nonfinite: Tensor | None = None,
) -> None:
    """Applies `reference.sampler_update` in place on contiguous x and h; not differentiable.

    Args:
        f: any floating-point dtype; float32 and bfloat16 are read without a copy.
        net_input: receives scale * x' + shift, the network's next input; shape of x, float32 or
            bfloat16, contiguous or channels-last.
        nonfinite: (B,) int32; set to 1 for each sample whose new state holds a NaN or an infinity,
            otherwise unchanged.
    """
    torch.ops.ncsn_fast.sampler_update_.default(
        x, f, h, coefficients, seed, samples, step, noise_weights, mask, known, c_ref, ref_step,
        net_input, scale, shift, nonfinite,
    )  # fmt: skip


def sampler_update(
    x: Tensor, f: Tensor, h: Tensor | None, coefficients: Sequence[float], **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Applies `sampler_update_` to copies and returns the new state and history, contiguous.

    Takes the same options.
    """
    x_new = x.detach().clone(memory_format=torch.contiguous_format)
    h_new = None if h is None else h.detach().clone(memory_format=torch.contiguous_format)
    sampler_update_(x_new, f.detach(), h_new, coefficients, **options)
    return x_new, h_new


def uniform(seed: int, samples: Tensor, stream: int, step: int, shape: Sequence[int]) -> Tensor:
    """Returns uniforms in [0, 1), float32 (B, *shape); see `noise.uniform`."""
    return torch.ops.ncsn_fast.uniform.default(seed, samples, stream, step, shape)


def normal(seed: int, samples: Tensor, stream: int, step: int, shape: Sequence[int]) -> Tensor:
    """Returns standard normals, float32 (B, *shape); see `noise.normal`."""
    return torch.ops.ncsn_fast.normal.default(seed, samples, stream, step, shape)


def _norm_reference(
    x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, elu: bool, eps: float
) -> Tensor:
    check_norm(x, alpha, gamma, beta)
    y = reference.instance_norm_plus(x, alpha, gamma, beta, elu=elu, eps=eps)
    return y.contiguous(memory_format=memory_format(x))


def _norm(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, elu: bool, eps: float) -> Tensor:
    if x.dtype not in CUDA_DTYPES or x.ndim != 4 or backend_name.get() == "reference":
        return _norm_reference(x, alpha, gamma, beta, elu, eps)
    check_norm(x, alpha, gamma, beta)
    if checks.on_gpu(x):
        return cuda.instance_norm_plus(x, alpha, gamma, beta, elu, eps)
    if not is_dense(x):
        x = x.contiguous()
    out = torch.empty_like(x)
    extension.instance_norm_plus(x, (alpha, gamma, beta), out, elu, eps, forced_isa.get())
    return out


def _norm_fake(
    x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, elu: bool, eps: float
) -> Tensor:
    check_norm(x, alpha, gamma, beta)
    return torch.empty_like(x, memory_format=memory_format(x))


def _check_group_norm(
    x: Tensor,
    groups: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    eps: float,
) -> None:
    rows = {"add": add, "scale": scale, "shift": shift}
    check_group_norm(x, groups, {"gamma": gamma, "beta": beta}, rows, activation)


def _group_norm(x: Tensor, groups: int, *arguments: Any) -> Tensor:
    _check_group_norm(x, groups, *arguments)
    *parameters, activation, eps = arguments
    if x.dtype not in CUDA_DTYPES or backend_name.get() == "reference":
        gamma, beta, add, scale, shift = parameters
        y = reference.group_norm(
            x, groups, gamma, beta, add=add, scale=scale, shift=shift, activation=activation,
            eps=eps,
        )  # fmt: skip
        return y.contiguous(memory_format=memory_format(x))
    if checks.on_gpu(x):
        return cuda.group_norm(x, groups, parameters, activation, eps)
    if not is_dense(x):
        x = x.contiguous()
    out = torch.empty_like(x)
    extension.group_norm(x, groups, parameters, out, activation, eps, forced_isa.get())
    return out


def _group_norm_fake(x: Tensor, *arguments: Any) -> Tensor:
    _check_group_norm(x, *arguments)
    return torch.empty_like(x, memory_format=memory_format(x))


def _activation(x: Tensor, name: str) -> Tensor:
    if not has_cpu_gradients(x):
        return ACTIVATIONS[name].function(x)
    if not is_dense(x):
        x = x.contiguous()
    out = torch.empty_like(x)
    extension.scale_shift(x, out, name, forced_isa.get())
    return out


def _activation_fake(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _update(*arguments: Any) -> None:
    u = UpdateArguments(*arguments)
    check_update(u)
    if u.x.dtype == torch.float64 or backend_name.get() == "reference":
        _update_reference(u)
    elif checks.on_gpu(u.x):
        cuda.sampler_update(u)
    else:
        extension.sampler_update(u, forced_isa.get())


def _update_reference(u: UpdateArguments) -> None:
    x_new, h_new = reference.sampler_update(
        u.x, u.f, u.h, u.coefficients, seed=u.seed, samples=u.samples, step=u.step,
        noise_weights=u.noise_weights, mask=u.mask, known=u.known, c_ref=u.c_ref,
        ref_step=u.ref_step,
    )  # fmt: skip
    u.x.copy_(x_new)
    if u.h is not None and h_new is not None:
        u.h.copy_(h_new)
    if u.net_input is not None:
        u.net_input.copy_(u.scale * x_new + u.shift)
    if u.nonfinite is not None:
        u.nonfinite.masked_fill_(~x_new.isfinite().flatten(1).all(1), 1)


def _update_fake(*arguments: Any) -> None:
    check_update(UpdateArguments(*arguments))


def _noise(kind: str) -> Any:
    def fill(seed: int, samples: Tensor, stream: int, step: int, shape: Sequence[int]) -> Tensor:
        if backend_name.get() == "reference":
            return getattr(noise, kind)(seed, samples, stream, step, tuple(shape))
        if checks.on_gpu(samples):
            return cuda.fill(kind, seed, samples, stream, step, shape)
        return extension.noise(kind, seed, samples, stream, step, shape, forced_isa.get())

    return fill


def _noise_fake(seed: int, samples: Tensor, stream: int, step: int, shape: Sequence[int]) -> Tensor:
    return samples.new_empty((samples.shape[0], *shape), dtype=torch.float32)


_LIBRARY = torch.library.Library("ncsn_fast", "DEF")


def _register(schema: str, run: Any, fake: Any) -> None:
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CPU")
    _LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"ncsn_fast::{name}", fake, lib=_LIBRARY)


_register(
    "instance_norm_plus(Tensor x, Tensor alpha, Tensor gamma, Tensor beta, bool elu, float eps)"
    " -> Tensor",
    _norm,
    _norm_fake,
)
torch.library.register_autograd(
    "ncsn_fast::instance_norm_plus",
    autograd.norm_backward,
    setup_context=autograd.norm_setup,
    lib=_LIBRARY,
)
_register(
    "instance_norm_plus_backward(Tensor grad, Tensor x, Tensor alpha, Tensor gamma, Tensor beta,"
    " bool elu, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    autograd.norm_gradients,
    autograd.norm_gradients_fake,
)
_register(
    "group_norm(Tensor x, int groups, Tensor? gamma, Tensor? beta, Tensor? add, Tensor? scale,"
    " Tensor? shift, str activation, float eps) -> Tensor",
    _group_norm,
    _group_norm_fake,
)
torch.library.register_autograd(
    "ncsn_fast::group_norm",
    autograd.group_norm_backward,
    setup_context=autograd.group_norm_setup,
    lib=_LIBRARY,
)
_register(
    "group_norm_backward(Tensor grad, Tensor x, int groups, Tensor? gamma, Tensor? beta,"
    " Tensor? add, Tensor? scale, Tensor? shift, str activation, float eps) -> Tensor[]",
    autograd.group_norm_gradients,
    autograd.group_norm_gradients_fake,
)
_register("activation(Tensor x, str name) -> Tensor", _activation, _activation_fake)
torch.library.register_autograd(
    "ncsn_fast::activation",
    autograd.activation_backward,
    setup_context=autograd.activation_setup,
    lib=_LIBRARY,
)
_register(
    "activation_backward(Tensor grad, Tensor x, str name) -> Tensor",
    autograd.activation_gradients,
    autograd.activation_gradients_fake,
)
_register(
    "sampler_update_(Tensor(a!) x, Tensor f, Tensor(b!)? h, float[] coefficients, int seed,"
    " Tensor samples, int step, Tensor? noise_weights, Tensor? mask, Tensor? known, float c_ref,"
    " int ref_step, Tensor(c!)? net_input, float scale, float shift, Tensor(d!)? nonfinite) -> ()",
    _update,
    _update_fake,
)
for _kind in ("uniform", "normal"):
    _register(
        f"{_kind}(int seed, Tensor samples, int stream, int step, int[] shape) -> Tensor",
        _noise(_kind),
        _noise_fake,
    )
