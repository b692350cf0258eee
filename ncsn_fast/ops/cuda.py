"""Ops on CUDA tensors: converts arguments for the selected kernel family (`ops.backends`).

Both families implement norms and sampler updates; only Triton implements the norm's gradient and
the noise, whichever family is selected. Arguments have already been checked (`ops.checks`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ncsn_fast.ops import extension, noise
from ncsn_fast.ops.backends import DEFAULT_FAMILY, family, has_triton
from ncsn_fast.ops.checks import CUDA_DTYPES, UpdateArguments, is_dense, memory_format


def instance_norm_plus(
    x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, elu: bool, eps: float
) -> Tensor:
    """Runs the norm and returns a tensor in x's memory format.

    The kernels take channels-last maps; other formats are copied there and back.
    """
    if family(DEFAULT_FAMILY) == "triton":
        from ncsn_fast.kernels.instance_norm_plus import instance_norm_plus as launch
    else:
        from ncsn_fast.ops.native import instance_norm_plus as launch
    maps = x.contiguous(memory_format=torch.channels_last)
    y: Tensor = launch(maps, alpha, gamma, beta, elu=elu, eps=eps)
    return y.contiguous(memory_format=memory_format(x))


def instance_norm_plus_backward(
    grad: Tensor, x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, elu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the norm's gradients by Triton; that of x has x's memory format.

    Not itself differentiable.
    """
    from ncsn_fast.kernels.instance_norm_plus_backward import instance_norm_plus_backward as launch

    maps = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    grad_x, *rest = launch(*maps, alpha, gamma, beta, elu=elu, eps=eps)
    # The launcher returns rows of one tensor; outputs of an op may not share memory.
    d_alpha, d_gamma, d_beta = (gradient.clone() for gradient in rest)
    return grad_x.contiguous(memory_format=memory_format(x)), d_alpha, d_gamma, d_beta


def group_norm(
    x: Tensor, groups: int, parameters: Sequence[Tensor | None], activation: str, eps: float
) -> Tensor:
    """Runs the group norm and returns a tensor in x's memory format, as `instance_norm_plus`.

    Args:
        parameters: gamma, beta (C,), add, scale and shift (N, C).
    """
    if family(DEFAULT_FAMILY) == "triton":
        from ncsn_fast.kernels.group_norm import group_norm as launch
    else:
        from ncsn_fast.ops.native import group_norm as launch
    gamma, beta, add, scale, shift = parameters
    y: Tensor = launch(
        x.contiguous(memory_format=torch.channels_last), groups, gamma, beta, add=add, scale=scale,
        shift=shift, activation=activation, eps=eps,
    )  # fmt: skip
    return y.contiguous(memory_format=memory_format(x))


def fill(
    kind: str, seed: int, samples: Tensor, stream: int, step: int, shape: Sequence[int]
) -> Tensor:
    """Returns noise (B, *shape), `kind` "uniform" or "normal"; synchronises to check `samples`."""
    if not has_triton("noise"):
        plain: Tensor = getattr(noise, kind)(seed, samples, stream, step, tuple(shape))
        return plain
    from ncsn_fast.kernels import fill as kernels

    noise.check_uint32("seed", seed)
    if samples.numel():
        smallest, largest = torch.stack(samples.aminmax()).tolist()
        noise.check_uint32("smallest sample index", smallest)
        noise.check_uint32("largest sample index", largest)
    samples = samples.to(torch.int64).contiguous()
    out = torch.empty((len(samples), *shape), dtype=torch.float32, device=samples.device)
    launch = getattr(kernels, f"{kind}_")
    launch(out, torch.full_like(samples, seed), samples, stream=stream, step=step)
    return out


def sampler_update(u: UpdateArguments) -> None:
    """Updates x and h in place.

    Uses the extension, unless Triton was requested or is the only family available.
    """
    if family("cuda") == "cuda":
        extension.sampler_update(u, extension.forced_isa.get())
        return
    from ncsn_fast.kernels.rows import new_rows
    from ncsn_fast.kernels.sampler_update import sampler_update_

    noise.check_uint32("seed", u.seed)
    f = u.f if u.f.dtype in CUDA_DTYPES else u.f.float()
    weights, known = (None if t is None else t.float() for t in (u.noise_weights, u.known))
    weights, known, mask = (None if t is None else t.contiguous() for t in (weights, known, u.mask))
    numbers = torch.tensor([u.row()], dtype=torch.float64)
    steps = torch.tensor([[u.step, u.ref_step]])
    samples = u.samples.contiguous()
    sampler_update_(
        u.x, f if is_dense(f) else f.contiguous(), u.h,
        new_rows(numbers, steps, u.x.device),
        seeds=torch.full_like(samples, u.seed), samples=samples, noise_weights=weights, mask=mask,
        known=known, net_input=u.net_input, nonfinite=u.nonfinite,
    )  # fmt: skip
