"""Samplers of the SDE papers as programs: Euler-Maruyama, reverse diffusion, ancestral sampling.

Rows use f = sigma * score (program.py). For VP and sub-VP, a row's sigma is the standard deviation
of x(t) given x(0), so -f is the noise that DDPM's networks predict.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ncsn_fast.diffusion.sde import SDE, VP, SubVP
from ncsn_fast.diffusion.spacing import check_ladder
from ncsn_fast.samplers.program import Column, Program, table

if TYPE_CHECKING:
    from ncsn_fast.diffusion.parameterisation import Parameterisation


def euler_maruyama(sde: SDE, n: int, *, t_end: float = 1e-3, denoise: bool = True) -> Program:
    """Returns Euler-Maruyama on the reverse SDE (the MNIST tutorial) at t = linspace(1, t_end, n).

    mean = x - (f(x, t) - g^2 s) Delta,  x = mean + g sqrt(Delta) z,  Delta = (1 - t_end) / (n - 1),
    or 1 - t_end for n = 1. The last of the n steps starts at t_end. NFE = n.

    Args:
        t_end: time of the last score evaluation; positive for SDEs with v(0) = 0.
        denoise: whether the last row returns its mean.
    """
    t = _descending_times(n, t_end)
    delta = (1 - t_end) / max(n - 1, 1)
    g, std = sde.diffusion(t), _positive(sde.std(t))
    c = g * math.sqrt(delta)
    if denoise:
        c[-1] = 0.0
    a = 1 - sde.rate(t) * delta
    return _program("em", std, a=a, b=g**2 * delta / std, c=c)


def reverse_diffusion(sigmas: ArrayLike, *, flow: bool = False, denoise: bool = True) -> Program:
    """Returns reverse diffusion sampling of VE (Song et al. 2021, appendix E).

    mean = x + G_i^2 s(x, sigma_i),  x = mean + G_i z,  G_i^2 = sigma_i^2 - sigma_{i+1}^2, where the
    level after the last is 0: the last mean is the denoised sample. NFE = L.

    Args:
        sigmas: (L,) descending.
        flow: use the probability flow: half of G_i^2 s, and no noise.
        denoise: whether the last row returns its mean.
    """
    sigma = check_ladder(np.asarray(sigmas))
    g = np.sqrt(sigma**2 - np.append(sigma[1:], 0.0) ** 2)
    return _reverse(sigma, np.zeros_like(g), g, flow, denoise)


def ancestral(sigmas: ArrayLike, eta: float = 1.0, *, denoise: bool = True) -> Program:
    """Returns ancestral sampling of VE (Song et al. 2021, appendix F), for eta = 1.

    x + sigma (sigma - down) s + up z from sigma to the next level n, with
    up = min(n, eta sqrt(n^2 (sigma^2 - n^2) / sigma^2)) and down^2 = n^2 - up^2. With eta = 0 it is
    Euler's method on the probability flow. The level after the last is 0. NFE = L, or L - 1 without
    `denoise`.

    Args:
        sigmas: (L,) descending.   eta: from 0 (no noise) to 1 and beyond.
        denoise: take the last row, from sigma_L to 0.
    """
    sigma, after = steps_of(sigmas, denoise)
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be at least 0; got {eta}")
    up = np.minimum(after, eta * after * np.sqrt(1 - (after / sigma) ** 2))
    down = np.sqrt(after**2 - up**2)
    return _program("ancestral", sigma, b=sigma - down, c=up)


def forward_ancestral(sigmas: ArrayLike, vp_scale: float = 0.0, *, denoise: bool = True) -> Program:
    """Returns ancestral sampling with the noise of the forward step (DDPM's sigma_t^2 = beta_t).

    mean = x + G^2 s as in `reverse_diffusion`. A VP chain x_t = m x adds sqrt(beta) z to x_t, which
    is sqrt(1 - beta) G z for x: with s = vp_scale sigma, the noise of the chain's data, 1 - beta is
    (1 + s_{i+1}^2) / (1 + s_i^2). NFE = L.

    Args:
        sigmas: (L,) descending.   vp_scale: 0 for VE.
        denoise: whether the last row returns its mean.
    """
    sigma = check_ladder(np.asarray(sigmas))
    after = np.append(sigma[1:], 0.0)
    g2 = sigma**2 - after**2
    c = np.sqrt(g2 * (1 + (vp_scale * after) ** 2) / (1 + (vp_scale * sigma) ** 2))
    if denoise:
        c[-1] = 0.0
    return _program("ancestral", sigma, b=g2 / sigma, c=c)


def in_ve_form(
    program: Program, mean_scale: Column, known: Parameterisation, shape: tuple[int, ...]
) -> Program:
    """Returns a VP or sub-VP program for x, where its states are x_t = m (k x + d).

    x' = A x + (b f + c z) / (k m') + (A - 1) d / k, with A = a m / m' for the m' of the next row,
    1 after the last, so that this is exactly the same sampler.

    Args:
        program: without history.   mean_scale: (K,) m of each row.
        known: parameterisation of the network, with k and d of its data.
        shape: of an image.
    """
    k, d = known.data_scale, known.data_shift
    after = np.append(mean_scale[1:], 1.0)
    a = program.a * mean_scale / after
    return dataclasses.replace(
        program,
        sigma=program.sigma / (k * mean_scale),
        a=a,
        b=program.b / (k * after),
        c=program.c / (k * after),
        e=(a - 1) * d / k,
        mean=np.full(shape, -d / k),
    )


def vp_reverse_diffusion(
    sde: VP, n: int, *, t_end: float = 1e-3, flow: bool = False, denoise: bool = True
) -> Program:
    """Returns reverse diffusion sampling of VP or sub-VP at t = linspace(1, t_end, n). NFE = n.

    mean = (1 - rate_i) x + G_i^2 s,  x = mean + G_i z, with the chain of `sde.discretise`.
    """
    t = _descending_times(n, t_end)
    chain = sde.discretise(n, t_end)
    return _reverse(_positive(sde.std(t)), chain.rate[::-1], chain.g[::-1], flow, denoise)


def vp_ancestral(sde: VP, n: int, *, t_end: float = 1e-3, denoise: bool = True) -> Program:
    """Returns ancestral sampling of VP (DDPM) at t = linspace(1, t_end, n). NFE = n.

    mean = (x + beta_i s) / sqrt(1 - beta_i),  x = mean + sqrt(beta_i) z; beta_i as in
    `VP.discretise`. Sub-VP has no ancestral sampler.
    """
    if isinstance(sde, SubVP):
        raise ValueError("ancestral sampling is defined for VE and VP; sub-VP has none")
    t = _descending_times(n, t_end)
    g = sde.discretise(n, t_end).g[::-1].copy()
    std, keep = _positive(sde.std(t)), np.sqrt(1 - g**2)
    b, c = g**2 / (std * keep), g
    if denoise:
        c[-1] = 0.0
    return _program("ancestral", std, a=1 / keep, b=b, c=c)


def _reverse(sigma: Column, rate: Column, g: Column, flow: bool, denoise: bool) -> Program:
    c = np.zeros_like(g) if flow else g.copy()
    if denoise:
        c[-1] = 0.0
    return _program("reverse", sigma, a=1 - rate, b=g**2 / sigma * (0.5 if flow else 1.0), c=c)


def _program(name: str, sigma: Column, *, b: Column, c: Column, **columns: object) -> Program:
    """Builds a program that starts from the prior and whose rows are each a level."""
    level = np.arange(len(sigma))
    return table(name, sigma, level, b=b, c=c, initial="prior", **columns)


def steps_of(sigmas: ArrayLike, denoise: bool) -> tuple[Column, Column]:
    """Returns where each step of a ladder (L,) starts and ends: L steps to 0, or L - 1 to sigma_L.

    Raises ValueError for a ladder without a step.
    """
    sigma = check_ladder(np.asarray(sigmas))
    if denoise:
        return sigma, np.append(sigma[1:], 0.0)
    if len(sigma) == 1:
        raise ValueError("one level and denoise=False leave no step; give more steps")
    return sigma[:-1], sigma[1:]


def _descending_times(n: int, t_end: float) -> Column:
    if n < 1:
        raise ValueError(f"steps must be at least 1; got {n}")
    if not 0 <= t_end < 1:
        raise ValueError(f"t_end must be in [0, 1); got {t_end}")
    return np.linspace(1.0, t_end, n)


def _positive(std: Column) -> Column:
    """Returns the standard deviations; ValueError if one is 0, where there is no score."""
    if not (std > 0).all():
        raise ValueError("t_end must be positive for this SDE: there is no score at t = 0")
    return std
