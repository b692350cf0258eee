"""Noise schedules: the number of noise levels, their sigmas, and the Langevin step size.

Song & Ermon 2020, "Improved techniques for training score-based generative models": Technique 1
chooses the largest sigma, Technique 2 the ratio of successive sigmas, Technique 4 the step size.
Few-step samplers use other spacings (spacing.py). "Ladder" means a descending sequence of sigmas.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit, ndtr
from torch import Tensor
from tqdm import tqdm

from ncsn_fast.diffusion.spacing import check_ladder

# Technique 1 uses every pair up to this many images of at most so many elements (32x32 RGB); of
# larger ones, as many as cost the same work.
EXACT_LIMIT, EXACT_DIM = 60_000, 3072
SUBSET_SIZE = 10_000  # Beyond it, it uses every pair of at most this many random images.


def geometric(sigma_begin: float, sigma_end: float, n_sigmas: int) -> Tensor:
    """Returns the geometric schedule sigma_begin > ... > sigma_end, (n_sigmas,) float32.

    float32 as published.
    """
    if n_sigmas < 1:
        raise ValueError(f"n_sigmas must be at least 1; got {n_sigmas}")
    if not 0 < sigma_end <= sigma_begin < math.inf:
        raise ValueError(
            f"expected 0 < sigma_end <= sigma_begin; "
            f"got sigma_begin={sigma_begin}, sigma_end={sigma_end}"
        )
    log_sigmas = np.linspace(math.log(sigma_begin), math.log(sigma_end), n_sigmas)
    return torch.from_numpy(np.exp(log_sigmas).astype(np.float32))


def compared_images(n: int, dim: int, seed: int = 0) -> Tensor | None:
    """Returns the indices of the images that Technique 1 compares; None for all n.

    The work grows as n^2 dim, so the limit falls as 1 / sqrt(dim): all of 60 000 images of 32x32
    RGB, of 15 000 of 128x128, of 7 500 of 256x256; beyond it, a random subset.

    Args:
        dim: elements of an image.
        seed: picks the subset.
    """
    limit = max(2, round(EXACT_LIMIT * min(1.0, math.sqrt(EXACT_DIM / dim))))
    if n <= limit:
        return None
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: min(SUBSET_SIZE, limit)]


def missed_share(n_compared: int, confidence: float = 0.95) -> float:
    """Bounds the share of pairs that are further apart than the largest distance in a subset.

    The subset holds n/2 independent pairs of images. If a share p of all pairs were further apart,
    all of them would be nearer with probability (1 - p)^(n/2).

    Returns:
        the p for which that is 1 - confidence: about 6 / n for 95 %.
    """
    return -math.expm1(math.log1p(-confidence) / (n_compared // 2))


def max_pairwise_distance(
    images: Tensor, *, block: int = 2048, seed: int = 0, progress: bool = False
) -> float:
    """Computes the largest Euclidean distance between two flattened images (Technique 1).

    Compares all pairs, or those of a random subset of large sets (compared_images). Works in
    blocks, so that memory beyond the images is block^2 floats.

    Args:
        images: (N, ...) float in the range the network is trained on, or uint8, which is divided by
            255.
        seed: picks the subset.
        progress: shows a progress bar after a second.
    """
    if len(images) < 2:
        raise ValueError(
            f"Technique 1 needs at least two images; got {len(images)}: give sigma_begin yourself"
        )
    chosen = compared_images(len(images), images[0].numel(), seed)
    images = images if chosen is None else images[chosen]
    flat = images.flatten(1)
    if flat.is_floating_point() and not bool(torch.isfinite(flat).all()):
        raise ValueError("the images hold NaN or infinite values; repair or remove them")
    scale = 1 / 255 if flat.dtype == torch.uint8 else 1.0
    mean = _mean_image(flat, block)

    def rows(start: int) -> Tensor:
        # Subtracting the mean image keeps distances and reduces cancellation.
        return (flat[start : start + block].to(torch.float32) - mean) * scale

    best, pair = -1.0, (0, 0)
    starts = range(0, len(flat), block)
    pairs = tqdm(
        itertools.combinations_with_replacement(starts, 2),
        total=len(starts) * (len(starts) + 1) // 2,
        desc="largest distance between images",
        unit="block",
        delay=1,
        disable=not progress,
    )
    left, at = rows(0), 0
    with pairs:
        for i, j in pairs:
            if i != at:
                left, at = rows(i), i
            distances = torch.cdist(left, rows(j), compute_mode="use_mm_for_euclid_dist")
            top = int(distances.argmax())
            if distances.flatten()[top] > best:
                best = float(distances.flatten()[top])
                pair = (i + top // distances.shape[1], j + top % distances.shape[1])
    first, second = (flat[k].to(torch.float64) * scale for k in pair)
    return float((first - second).norm())


def _mean_image(flat: Tensor, block: int) -> Tensor:
    total = torch.zeros(flat.shape[1], dtype=torch.float64)
    for start in range(0, len(flat), block):
        total += flat[start : start + block].to(torch.float64).sum(dim=0)
    return (total / len(flat)).to(torch.float32)


def overlap(ratio: float, dim: int) -> float:
    """Computes Technique 2's C in `dim` dimensions.

    The share of a level's radii that the next level covers.
    """
    shift = math.sqrt(2 * dim) * (ratio - 1)
    return float(ndtr(shift + 3 * ratio) - ndtr(shift - 3 * ratio))


def level_ratio(dim: int, c: float = 0.5) -> float:
    """Computes the ratio gamma > 1 of successive sigmas whose overlap is c (Technique 2)."""
    limit = overlap(1.0, dim)
    if not 0 < c < limit:
        raise ValueError(f"the overlap C must be in (0, {limit:.4f}); got {c}")
    upper = 2.0
    while overlap(upper, dim) > c and upper < 1e6:
        upper *= 2
    if overlap(upper, dim) > c:
        raise ValueError(
            f"no ratio reaches an overlap of C={c} in {dim} dimensions; give n_sigmas yourself"
        )
    return float(brentq(lambda ratio: overlap(ratio, dim) - c, 1.0, upper, xtol=1e-14))


def n_levels(sigma_begin: float, sigma_end: float, dim: int, c: float = 0.5) -> int:
    """Computes L = 1 + log(sigma_begin / sigma_end) / log gamma, to the nearest integer."""
    return max(1, round(1 + math.log(sigma_begin / sigma_end) / math.log(level_ratio(dim, c))))


def variance_ratio(epsilon: float, ratio: float, n_steps_each: int, sigma_end: float) -> float:
    """Computes Technique 4's s_T^2 / sigma^2 after T Langevin steps, started from the level above.

    Args:
        epsilon: step size; alpha_i = epsilon sigma_i^2 / sigma_L^2 in x + alpha s + sqrt(2 alpha)
            z.
        ratio: sigma_{i-1} / sigma_i of the ladder in use.
    """
    eta = epsilon / sigma_end**2
    decay = (1 - eta) ** 2
    stationary = 2 * eta / (1 - decay)
    return decay**n_steps_each * (ratio**2 - stationary) + stationary


def technique4(ratio: float, n_steps_each: int, sigma_end: float) -> float:
    """Computes the epsilon in (0, sigma_L^2) whose variance ratio is nearest 1 (Technique 4).

    Grid search with refinement. Raises ValueError if none exists, as for a single level.
    """
    if n_steps_each < 1:
        raise ValueError(f"n_steps_each must be at least 1; got {n_steps_each}")

    def miss(logit: float) -> float:
        return abs(variance_ratio(expit(logit) * sigma_end**2, ratio, n_steps_each, sigma_end) - 1)

    # epsilon / sigma_L^2 from 1e-6 to 1 - 1e-13: coarse ladders with few steps come close to 1.
    grid = np.linspace(-13.8, 30.0, 8000)
    best = int(np.argmin([miss(logit) for logit in grid]))
    if best == 0:
        raise ValueError(
            f"Technique 4 finds no step inside (0, sigma_L^2) for neighbours of ratio {ratio:.6g}; "
            "give epsilon yourself"
        )
    bounds = (grid[best - 1], grid[min(best + 1, len(grid) - 1)])
    refined = minimize_scalar(miss, bounds=bounds, method="bounded", options={"xatol": 1e-12})
    logit = refined.x if refined.fun <= miss(grid[best]) else grid[best]
    return float(expit(logit)) * sigma_end**2


def epsilon_for(sigmas: Tensor | NDArray[np.floating], n_steps_each: int) -> float:
    """Computes Technique 4's epsilon for a ladder of at least two levels.

    Uses the ladder's mean (geometric) ratio.
    """
    ladder = check_ladder(sigmas)
    ratio = (ladder[0] / ladder[-1]) ** (1 / max(len(ladder) - 1, 1))
    return technique4(ratio, n_steps_each, float(ladder[-1]))


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Noise schedule that Techniques 1, 2 and 4 give for a data set."""

    sigma_begin: float
    sigma_end: float
    n_sigmas: int
    epsilon: float


def check_distance(distance: float, sigma_end: float) -> float:
    """Returns a largest distance of images that can be sigma_begin; raises ValueError otherwise."""
    if distance <= sigma_end:
        raise ValueError(
            f"the images are all (nearly) equal: largest distance {distance:g} <= sigma_end "
            f"{sigma_end:g}; give sigma_begin and n_sigmas yourself"
        )
    return distance


def derive(
    images: Tensor, *, sigma_end: float = 0.01, c: float = 0.5, n_steps_each: int = 5, seed: int = 0
) -> Ladder:
    """Derives the noise schedule for images (N, C, H, W) by Techniques 1, 2 and 4."""
    sigma_begin = check_distance(max_pairwise_distance(images, seed=seed), sigma_end)
    n = n_levels(sigma_begin, sigma_end, images[0].numel(), c)
    epsilon = epsilon_for(geometric(sigma_begin, sigma_end, n), n_steps_each)
    return Ladder(sigma_begin, sigma_end, n, epsilon)


MOST_LEVELS, MOST_RATIO = 1000, 1.2


def usual_n_sigmas(sigma_begin: float, sigma_end: float, dim: int) -> int:
    """Returns the number of levels for a network whose ladder nobody gave.

    It is Technique 2's, at most 1000, and at least so many that neighbours differ by 20 %.
    """
    try:
        ratio = min(level_ratio(dim), MOST_RATIO)
    except ValueError:  # few dimensions, where levels overlap whatever they are
        ratio = MOST_RATIO
    return min(1 + round(math.log(sigma_begin / sigma_end) / math.log(ratio)), MOST_LEVELS)


def usual_epsilon(ladder: NDArray[np.float64], n_steps_each: int) -> float:
    """Returns Technique 4's epsilon; half the variance for a single level, which has none."""
    if len(ladder) < 2:
        return float(ladder[-1] ** 2 / 2)
    return epsilon_for(ladder, max(n_steps_each, 1))
