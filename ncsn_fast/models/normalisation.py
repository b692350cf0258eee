"""Group norm of the U-Nets, with what stands beside it."""

from __future__ import annotations

from torch import Tensor, nn

from ncsn_fast import ops


def normalise(
    norm: nn.Module,
    x: Tensor,
    *,
    activation: str = "none",
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Computes activation(norm(x + add) (1 + scale) + shift): one op in training on the CPU.

    Args:
        norm: an nn.GroupNorm.   activation: a key of ops.activations.
        add, scale, shift: (N, C); scale and shift come together.
    """
    assert isinstance(norm, nn.GroupNorm)
    if ops.trains_by_kernels(x):
        return ops.group_norm(
            x, norm.num_groups, norm.weight, norm.bias, add=add, scale=scale, shift=shift,
            activation=activation, eps=norm.eps,
        )  # fmt: skip
    h = norm(x if add is None else x + add[:, :, None, None])
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return ops.activation(h, activation)
