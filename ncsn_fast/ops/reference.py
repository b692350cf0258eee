"""Reference implementation of every fused op in plain PyTorch; works in float64.

The kernels in csrc/ and kernels/ share these signatures and are tested against these functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsn_fast.ops import noise
from ncsn_fast.ops.activations import ACTIVATIONS
from ncsn_fast.ops.checks import padded
from ncsn_fast.ops.noise import Stream


def _per_channel(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Reshapes (C,) or (N, C) to broadcast against (N, C)."""
    parameter = parameter.to(dtype)
    return parameter if parameter.ndim == 2 else parameter[None, :]


def _computed(x: Tensor) -> Tensor:
    """Converts x to the dtype of the arithmetic: float64 if x is float64, else float32."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _standardised_channels(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardises each channel over (H, W), and the channels' means over the channels.

    Returns:
        x with mean 0 in each channel, its 1/std (N, C), the standardised means (N, C) and their
        1/std (N, 1).
    """
    # Two passes: torch.var_mean is 80 times slower on channels-last maps (CPU).
    mean = x.mean(dim=(2, 3))
    centred = x - mean[:, :, None, None]
    rest = centred.mean(dim=(2, 3))  # what rounding left in the means
    centred = centred - rest[:, :, None, None]
    rstd = torch.rsqrt(centred.square().mean(dim=(2, 3)) + eps)
    deviation = mean - mean.mean(dim=1, keepdim=True) + rest
    return centred, rstd, *standardised_means(deviation, eps)


def standardised_means(deviation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Standardises the channels' means over the channels.

    Args:
        deviation: (N, C), the means less their mean over the channels.

    Returns:
        the standardised means (N, C), and their 1/std (N, 1).
    """
    # One channel has no spread; the unbiased variance is then taken as 0.
    spread = deviation.square().sum(dim=1, keepdim=True) / max(deviation.shape[1] - 1, 1)
    rstd_channels = torch.rsqrt(spread + eps)
    return deviation * rstd_channels, rstd_channels


def instance_norm_plus(
    x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, *, elu: bool = False, eps: float = 1e-5
) -> Tensor:
    """Applies instance normalisation++ (Song & Ermon 2019, appendix A) and optionally ELU.

    y = gamma * ((x - mu) / sqrt(var + eps) + alpha * (mu - m) / sqrt(v + eps)) + beta
    mu, var: mean and biased variance over H, W; m, v: mean and unbiased variance of mu over the
        channels.

    Args:
        x: (N, C, H, W), any memory format. Low-precision input is computed in float32.
        alpha, gamma, beta: (C,), or (N, C) for the conditional form (one row per sample).
        elu: apply ELU (alpha = 1) to the result.
        eps: stabiliser inside both square roots.

    Returns:
        Tensor like x: its shape, dtype and memory format.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(compute)
    centred, rstd, mean_hat, _ = _standardised_channels(h, eps)
    alpha, gamma, beta = (_per_channel(p, compute) for p in (alpha, gamma, beta))
    # Centred before scaling: scale * x + shift would cancel badly for a large mean.
    normalised = centred * (gamma * rstd)[:, :, None, None]
    y = normalised + (gamma * alpha * mean_hat + beta)[:, :, None, None]
    return (F.elu(y) if elu else y).to(x.dtype)


def instance_norm_plus_backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    elu: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of `instance_norm_plus` with respect to x, alpha, gamma and beta.

    Statistics are recomputed from x, so the result is itself differentiable.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(compute)
    grad = grad.to(compute)
    centred, rstd, mean_hat, rstd_channels = _standardised_channels(h, eps)
    row_alpha, row_gamma, row_beta = (_per_channel(p, compute) for p in (alpha, gamma, beta))
    normalised = centred * rstd[:, :, None, None]
    if elu:
        y = (
            normalised * row_gamma[:, :, None, None]
            + (row_gamma * row_alpha * mean_hat + row_beta)[:, :, None, None]
        )
        grad = ACTIVATIONS["elu"].backward(grad, y)
    grad_sum = grad.sum(dim=(2, 3))
    grad_dot = (grad * normalised).sum(dim=(2, 3))
    grad_mean = standardised_means_backward(
        row_gamma * row_alpha * grad_sum, mean_hat, rstd_channels
    )
    # Through the normalised map: the usual instance-norm rule, plus the mean's share.
    size = x.shape[2] * x.shape[3]
    shift = (grad_mean - row_gamma * rstd * grad_sum) / size
    slope = -(row_gamma * rstd * grad_dot) / size
    grad_x = (
        grad * (row_gamma * rstd)[:, :, None, None]
        + normalised * slope[:, :, None, None]
        + shift[:, :, None, None]
    )

    return (
        grad_x.to(x.dtype),
        summed_like(row_gamma * mean_hat * grad_sum, alpha),
        summed_like(grad_dot + row_alpha * mean_hat * grad_sum, gamma),
        summed_like(grad_sum, beta),
    )


def standardised_means_backward(grad: Tensor, mean_hat: Tensor, rstd_channels: Tensor) -> Tensor:
    """Computes the gradient of `standardised_means` for the means, a layer norm without affine."""
    along = (grad * mean_hat).sum(dim=1, keepdim=True) / max(grad.shape[1] - 1, 1)
    return rstd_channels * (grad - grad.mean(dim=1, keepdim=True) - mean_hat * along)


def summed_like(grad: Tensor, parameter: Tensor) -> Tensor:
    """Sums a gradient (N, C) over the samples, unless there is a row of parameters for each."""
    return (grad if parameter.ndim == 2 else grad.sum(dim=0)).to(parameter.dtype)


def _per_pixel(row: Tensor | None, like: Tensor, otherwise: float) -> Tensor | float:
    """Reshapes (C,) or (N, C) to broadcast against (N, C, H, W); None becomes `otherwise`."""
    return otherwise if row is None else _per_channel(row, like.dtype)[:, :, None, None]


def _group_mean(x: Tensor, groups: int) -> Tensor:
    """Returns the mean of each group of channels over its channels, H and W, as (N, C, 1, 1)."""
    n, c = x.shape[:2]
    # Map by map first: a reshape to groups would copy channels-last maps.
    means = x.mean(dim=(2, 3)).reshape(n, groups, c // groups).mean(dim=2, keepdim=True)
    return means.expand(n, groups, c // groups).reshape(n, c, 1, 1)


def _standardised_groups(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x with mean 0 and variance 1 in each group, and the 1/std as (N, C, 1, 1)."""
    centred = x - _group_mean(x, groups)
    rstd = torch.rsqrt(_group_mean(centred.square(), groups) + eps)
    return centred * rstd, rstd


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
    """Applies group normalisation (Wu & He 2018), modulated, and an activation.

    h = x + add,   u = (h - mu) / sqrt(var + eps) * gamma + beta
    y = activation(u * (1 + scale) + shift)
    mu, var: mean and biased variance of a group of C / groups channels, over H, W.

    Args:
        x: (N, C, H, W), any memory format. Low-precision input is computed in float32.
        groups: divides C.
        gamma, beta: (C,); None is 1 and 0.
        add, scale, shift: (N, C), usually of a time embedding; None is 0.
        activation: a name of `ops.activations`.
        eps: stabiliser inside the square root.

    Returns:
        Tensor like x: its shape, dtype and memory format.
    """
    h = _computed(x)
    h = h + _per_pixel(add, h, 0.0)
    normalised, _ = _standardised_groups(h, groups, eps)
    u = normalised * _per_pixel(gamma, h, 1.0) + _per_pixel(beta, h, 0.0)
    z = u * (1 + _per_pixel(scale, h, 0.0)) + _per_pixel(shift, h, 0.0)
    return ACTIVATIONS[activation].function(z).to(x.dtype)


def group_norm_backward(
    grad: Tensor,
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
) -> tuple[Tensor | None, ...]:
    """Computes the gradients of `group_norm` for x, gamma, beta, add, scale and shift.

    That of None is None. Statistics are recomputed from x, so the result is differentiable.
    """
    h = _computed(x)
    h = h + _per_pixel(add, h, 0.0)
    normalised, rstd = _standardised_groups(h, groups, eps)
    slope, modulation = _per_pixel(gamma, h, 1.0), 1 + _per_pixel(scale, h, 0.0)
    u = normalised * slope + _per_pixel(beta, h, 0.0)
    z = u * modulation + _per_pixel(shift, h, 0.0)
    grad_z = ACTIVATIONS[activation].backward(grad.to(h.dtype), z)
    grad_u = grad_z * modulation
    grad_normalised = grad_u * slope
    along = _group_mean(grad_normalised * normalised, groups)
    rest = grad_normalised - _group_mean(grad_normalised, groups) - normalised * along
    grad_h = rstd * rest

    def summed(g: Tensor, parameter: Tensor | None, dims: tuple[int, ...]) -> Tensor | None:
        return None if parameter is None else g.sum(dim=dims).to(parameter.dtype)

    return (
        grad_h.to(x.dtype),
        summed(grad_u * normalised, gamma, (0, 2, 3)),
        summed(grad_u, beta, (0, 2, 3)),
        summed(grad_h, add, (2, 3)),
        summed(grad_z * u, scale, (2, 3)),
        summed(grad_z, shift, (2, 3)),
    )


def elu(x: Tensor) -> Tensor:
    """Computes ELU: x if x > 0, exp(x) - 1 otherwise."""
    return F.elu(_computed(x)).to(x.dtype)


def add_elu(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a + b and elu(a + b), whose sum is not rounded to a's dtype first."""
    total = _computed(a) + _computed(b)
    return total.to(a.dtype), F.elu(total).to(a.dtype)


def activation(x: Tensor, name: str) -> Tensor:
    """Computes an activation of `ops.activations`."""
    return ACTIVATIONS[name].function(_computed(x)).to(x.dtype)


def add_activation(
    a: Tensor, b: Tensor, name: str = "none", weights: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Returns s = w_a a + w_b b and activation(s), whose s is not rounded to a's dtype first."""
    total = weights[0] * _computed(a) + weights[1] * _computed(b)
    return total.to(a.dtype), ACTIVATIONS[name].function(total).to(a.dtype)


def scale_shift(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str = "none"
) -> Tensor:
    """Computes activation(scale x + shift); scale and shift are (N, C), None is 1 and 0."""
    h = _computed(x)
    z = h * _per_pixel(scale, h, 1.0) + _per_pixel(shift, h, 0.0)
    return ACTIVATIONS[activation].function(z).to(x.dtype)


def upsample_nearest(x: Tensor, rows: int, columns: int) -> Tensor:
    """Repeats every pixel `rows` times down and `columns` times along."""
    return x.repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)


def depthwise_transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """Computes a transposed convolution with a kernel (k, k) for each channel: weight (k, k, C)."""
    kernels = _computed(weight).to(_computed(x).dtype).permute(2, 0, 1)[:, None]
    shift = None if bias is None else bias.to(kernels.dtype)
    return F.conv_transpose2d(
        _computed(x), kernels, shift, stride=stride, padding=padding, groups=x.shape[1]
    ).to(x.dtype)


def depth_to_space(
    z: Tensor, factor: int, *, size: tuple[int, int] | None = None, first: int = 0
) -> Tensor:
    """Makes groups of channels squares of factor x factor pixels, row by row.

    `size` rows and columns are returned from number `first` on; None for all.
    """
    n, channels, height, width = z.shape
    c = channels // factor**2
    squares = z.view(n, factor, factor, c, height, width).permute(0, 3, 4, 1, 5, 2)
    y = squares.reshape(n, c, height * factor, width * factor)
    rows, columns = size or y.shape[2:]
    return y[:, :, first : first + rows, first : first + columns]


def softmax(x: Tensor, scale: float = 1.0) -> Tensor:
    """Computes the softmax of scale * x along the last axis."""
    return (_computed(x) * scale).softmax(dim=-1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Computes softmax(scale q k^T) v of each head; scale is 1 / sqrt(D) if None.

    q is (N, L, heads, D), k (N, M, heads, D), v (N, M, heads, E); the result (N, L, heads, E).
    """
    factor = q.shape[3] ** -0.5 if scale is None else scale
    scores = torch.einsum("nlhd,nmhd->nhlm", _computed(q) * factor, _computed(k))
    return torch.einsum("nhlm,nmhe->nlhe", scores.softmax(dim=3), _computed(v)).to(q.dtype)


def max_pool5(x: Tensor) -> Tensor:
    """Computes the maximum of each 5x5 window, stride 1, clipped at the border."""
    return F.max_pool2d(x, 5, stride=1, padding=2)


def avg_pool5(x: Tensor) -> Tensor:
    """Computes the mean of each 5x5 window, stride 1, zero padding 2 (zeros counted)."""
    return F.avg_pool2d(_computed(x), 5, stride=1, padding=2).to(x.dtype)


def winograd_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1
) -> Tensor:
    """Computes a 3x3 convolution, stride 1, same size: (N, I, H, W) to (N, O, H, W)."""
    return F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)


def tile_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str = "none",
) -> Tensor:
    """Computes activation(convolution + added): 1x1 or 3x3, stride 1, same size."""
    padding = dilation * (weight.shape[2] // 2)
    y = F.conv2d(x, weight, bias, padding=padding, dilation=dilation)
    return ACTIVATIONS[activation].function(y if added is None else y + added)


def mean_pool2(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Computes the mean of each 2x2 square of a, or of a + b; (N, C, H / 2, W / 2)."""
    total = _computed(a) if b is None else _computed(a) + _computed(b)
    return F.avg_pool2d(total, 2).to(a.dtype)


def resize_add(x: Tensor, size: tuple[int, int], a: Tensor | None = None) -> Tensor:
    """Returns a + resize(x), or resize(x) alone: bilinear, aligned corners.

    Output pixel (i, j) samples x at (i (h - 1) / (H - 1), j (w - 1) / (W - 1)); an output with one
    row (or column) takes the first row (or column) of x.
    """
    y = F.interpolate(_computed(x), size=size, mode="bilinear", align_corners=True)
    return (y if a is None else _computed(a) + y).to(x.dtype)


def combine_row(
    x: Tensor,
    f: Tensor,
    h: Tensor | None,
    coefficients: Sequence[float],
    z: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Applies one row of a Program, noise given.

    x' = a x + b f + g h + c z + e,   h' = p x + q f + r,   coefficients = (a, b, g, c, p, q), with
    or without (e, r), which are 0 otherwise.
    """
    a, b, g, c, p, q, e, r = padded(coefficients)
    f = f.to(x.dtype)
    x_new = a * x + e + b * f
    if h is not None:
        x_new = x_new + g * h
    if c != 0.0 and z is not None:
        x_new = x_new + c * z.to(x.dtype)
    return x_new, None if h is None else p * x + r + q * f


def row_noise(
    seed: int,
    samples: Tensor,
    step: int,
    shape: tuple[int, ...],
    noise_weights: Tensor | None = None,
) -> Tensor:
    """Returns the noise z of one row; with weights (B, 2), w0 z(stream 0) + w1 z(stream 3)."""
    z = noise.normal(seed, samples, Stream.SAMPLER, step, shape)
    if noise_weights is None:
        return z
    second = noise.normal(seed, samples, Stream.SECOND, step, shape)
    w = noise_weights.to(z.dtype).reshape(-1, 2, *([1] * len(shape)))
    return w[:, 0] * z + w[:, 1] * second


def impose_known(x: Tensor, mask: Tensor, known: Tensor, c_ref: float, z: Tensor | None) -> Tensor:
    """Sets known pixels (mask True) to known + c_ref z; leaves the others unchanged."""
    noised = known if c_ref == 0.0 or z is None else known + c_ref * z.to(known.dtype)
    return torch.where(mask, noised.to(x.dtype), x)


def sampler_update(
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
) -> tuple[Tensor, Tensor | None]:
    """Applies one row of a sampler program, including its noise (samplers/program.py).

    The row is that of `combine_row`;
    then, where mask is True and c_ref is not NaN, x' = known + c_ref z_ref.

    Args:
        x: state (B, C, H, W), float32 (float64 in tests).
        f: network output, shape of x, any float dtype and memory format.
        h: history, shape of x, or None for a program without history.
        seed, samples, step: the noise is z(seed, samples[b], stream, step, element); samples is
            (B,) int64.
        noise_weights: (B, 2); z = w0 z(stream 0) + w1 z(stream 3). None means (1, 0).
        mask, known: bool and float, shape of x.
        c_ref, ref_step: scale and step index of the noise on known pixels (stream 2); if c_ref is
            NaN, known pixels are not imposed.
    """
    shape = tuple(x.shape[1:])
    z = row_noise(seed, samples, step, shape, noise_weights) if coefficients[3] != 0.0 else None
    x_new, h_new = combine_row(x, f, h, coefficients, z)
    if mask is not None and known is not None and not math.isnan(c_ref):
        z_ref = (
            noise.normal(seed, samples, Stream.REFERENCE, ref_step, shape) if c_ref != 0.0 else None
        )
        x_new = impose_known(x_new, mask, known, c_ref, z_ref)
    return x_new, h_new
