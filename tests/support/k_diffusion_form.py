"""Samplers written in the form of k-diffusion, for tests without that package."""

import itertools

import torch


def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0):
    """Euler's method on the probability flow."""
    del s_churn
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
        x = x + (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
    assert disable
    return x


def sample_euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, noise_sampler=None
):
    """Euler steps that go too far, and noise that leads back."""
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        denoised = model(x, sigma.expand(len(x)), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "denoised": denoised})
        up = eta * (following**2 * (sigma**2 - following**2) / sigma**2).sqrt()
        down = (following**2 - up**2).clamp(min=0).sqrt()
        x = x + (down - sigma) * (x - denoised) / sigma
        if following > 0:
            x = x + up * noise_sampler(sigma, following)
    assert disable
    return x


def sample_between(model, x, sigma_min, sigma_max, n):
    """Has another form."""
    return torch.zeros_like(x)
