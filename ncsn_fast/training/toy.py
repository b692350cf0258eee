"""Toy experiment of NCSN (2019) in two dimensions: `python -m ncsn_fast.train --config toy`.

A small network learns the score of 0.8 N((5, 5), I) + 0.2 N((-5, -5), I) by score matching (figure
2 of the paper). The paper's two samplers start from U[-8, 8]^2 with exact scores (figure 3):
Langevin dynamics keeps the weights of its start, annealed Langevin dynamics finds 0.8 and 0.2. Here
annealed Langevin dynamics also runs with the learnt scores.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ncsn_fast.data import files
from ncsn_fast.diffusion import objectives
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.langevin import annealed_langevin
from ncsn_fast.samplers.program import Chains, Program, run
from ncsn_fast.training.configs import ToyOptions

SIGMAS = np.geomspace(
    20.0, 1.0, 10
)  # standard deviations of the components; the last level is the data
EPSILON, N_STEPS_EACH = 0.1, 100  # in the paper's form of the step
EXTENT = 8.0  # chains start in [-8, 8]^2, and fields are drawn there
DENOISED = 0.2  # share of the variance of a level that denoising score matching removes

LevelScore = Callable[[Tensor, float], Tensor]  # (x (N, 2), sigma of the components) -> (N, 2)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Mixture of isotropic Gaussians: weights (K,), means (K, D), one standard deviation sigma.

    Adding N(0, tau^2) noise gives the same mixture at sqrt(sigma^2 + tau^2), so that scores are
    exact at every noise level.
    """

    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    sigma: float = 1.0

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws n exact samples (n, D) float32."""
        k = torch.multinomial(torch.tensor(self.weights), n, replacement=True, generator=generator)
        means = torch.tensor(self.means)
        return means[k] + self.sigma * torch.randn(n, means.shape[1], generator=generator)

    def _joint(self, x: Tensor, sigma: float) -> Tensor:
        """Returns log of weight times density of each component, (N, K), at x (N, D)."""
        means, weights = x.new_tensor(self.means), x.new_tensor(self.weights)
        squares = (x[:, None] - means).square().sum(2)
        scale = 0.5 * x.shape[1] * math.log(2 * math.pi * sigma**2)
        return weights.log() - 0.5 * squares / sigma**2 - scale

    def log_density(self, x: Tensor, sigma: float | None = None) -> Tensor:
        """Returns log p(x) (N,) at x (N, D); `sigma` replaces the width of the components."""
        return self._joint(x, self.sigma if sigma is None else sigma).logsumexp(1)

    def score(self, x: Tensor, sigma: float | None = None) -> Tensor:
        """Returns grad log p(x) (N, D); `sigma` replaces the width of the components."""
        sigma = self.sigma if sigma is None else sigma
        share = self._joint(x, sigma).softmax(1)
        return (share @ x.new_tensor(self.means) - x) / sigma**2


MIXTURE = Mixture(weights=(0.8, 0.2), means=((5.0, 5.0), (-5.0, -5.0)))


class ScoreMLP(nn.Module):
    """Score network (x (N, 2), sigma) -> (N, 2): three layers with softplus, as in the paper.

    The paper's network knows one level. This one serves all: x is divided by the spread of the
    mixture, log sigma is a third input, and the output is divided by sigma, as in NCSNv2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.Softplus(), nn.Linear(width, width), nn.Softplus(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))[:, None]
        spread = torch.sqrt(sigma.square() + 25)
        output: Tensor = self.layers(torch.cat([x / spread, sigma.log()], dim=1))
        return output / sigma


def losses(
    objective: str, net: ScoreMLP, means: Tensor, sigma: Tensor, generator: torch.Generator
) -> Tensor:
    """Returns losses (N,), times sigma^2, of draws with means (N, 2) and widths sigma (N,).

    Denoising takes DENOISED of the variance from the noise that it removes and the rest from the
    data, so that every objective learns the same score.
    """
    z, noise_z = torch.randn(2, *means.shape, generator=generator).unbind()

    def score(y: Tensor) -> Tensor:
        return net(y, sigma)

    if objective == "denoising":
        x = means + math.sqrt(1 - DENOISED) * sigma[:, None] * z
        found = objectives.denoising(score, x, math.sqrt(DENOISED) * sigma, noise_z)
    elif objective == "implicit":
        found = objectives.implicit(score, means + sigma[:, None] * z)
    else:
        found = objectives.sliced(
            score,
            means + sigma[:, None] * z,
            variance_reduced=objective == "sliced-vr",
            generator=generator,
        )
    return found * sigma.square()


def fit(
    options: ToyOptions, stop: Sequence[int] = (), *, progress: bool = True
) -> tuple[ScoreMLP, bool]:
    """Trains a network on the levels SIGMAS, until options.steps or until `stop` is not empty.

    Returns the network, and whether it reached options.steps.
    """
    torch.manual_seed(options.seed)  # initial weights
    net = ScoreMLP(options.width)
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    sigmas = torch.tensor(SIGMAS, dtype=torch.float32)
    means = dataclasses.replace(MIXTURE, sigma=0.0)
    for step in tqdm(range(options.steps), unit="step", disable=not progress, dynamic_ncols=True):
        if stop:
            return net.eval(), False
        level = objectives.random_levels(options.batch_size, len(sigmas), generator)
        centres = means.sample(options.batch_size, generator)
        loss = losses(options.objective, net, centres, sigmas[level], generator).mean()
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}; use a smaller --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    if not all(bool(weight.isfinite().all()) for weight in net.parameters()):
        raise RuntimeError(f"a weight is not finite at step {options.steps}; use a smaller --lr")
    return net.eval(), True


def draw(program: Program, score: LevelScore, n: int, seed: int) -> Tensor:
    """Draws samples (n, 2) with a program that starts from U[-8, 8]^2."""
    samples = noise.sample_indices(0, n)
    start = EXTENT * (2 * noise.uniform(seed, samples, Stream.INITIAL, 0, (1, 1, 2)) - 1)

    def network(x: Tensor, k: int) -> Tensor:
        sigma = float(program.sigma[k])
        return sigma * score(x.flatten(1), sigma).reshape(x.shape)

    with torch.no_grad():
        return run(program, network, Chains(x=start, seed=seed, samples=samples)).flatten(1)


def sample_all(net: LevelScore, n: int, seed: int) -> dict[str, Tensor]:
    """Draws the samples (n, 2) of figure 3 and of annealing with learnt scores, by title."""
    options: dict[str, Any] = {"epsilon": EPSILON, "denoise": False, "form": "paper"}
    steps = len(SIGMAS) * N_STEPS_EACH
    plain = annealed_langevin(SIGMAS[-1:], n_steps_each=steps, **options)
    annealed = annealed_langevin(SIGMAS, n_steps_each=N_STEPS_EACH, **options)
    return {
        "exact": MIXTURE.sample(n, torch.Generator().manual_seed(seed)),
        "Langevin": draw(plain, MIXTURE.score, n, seed),
        "annealed Langevin": draw(annealed, MIXTURE.score, n, seed),
        "annealed, learnt scores": draw(annealed, net, n, seed),
    }


def share(x: Tensor) -> float:
    """Returns the share of samples (n, 2) on the side of (5, 5); 0.8 for the mixture."""
    return float((x.sum(1) > 0).double().mean())


def field_error(net: LevelScore, n: int = 20_000, seed: int = 1) -> float:
    """Returns E || learnt - true score ||^2 / E || true score ||^2 over the data."""
    x = MIXTURE.sample(n, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        true, learnt = MIXTURE.score(x), net(x, MIXTURE.sigma)
    return float((learnt - true).square().sum() / true.square().sum())


def figure_class() -> Any:
    """Returns matplotlib's Figure.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("figures need matplotlib: pip install '.[train]'") from error
    return Figure


def _panels(titles: Sequence[str], extent: float) -> tuple[Any, Any]:
    figure = figure_class()(figsize=(4 * len(titles), 4.8), layout="constrained")
    panels = figure.subplots(1, len(titles), sharex=True, sharey=True, squeeze=False)[0]
    limits, ticks = (-extent, extent), (-5, 0, 5)
    for panel, title in zip(panels, titles, strict=True):
        panel.set(title=title, xlim=limits, ylim=limits, aspect="equal", xticks=ticks, yticks=ticks)
    return figure, panels


def _save(figure: Any, path: Path) -> None:
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def save_fields(net: LevelScore, path: Path) -> None:
    """Writes a PNG of true and learnt score, at one scale, over the density (figure 2)."""
    fine, coarse = torch.linspace(-EXTENT, EXTENT, 161), torch.linspace(-EXTENT, EXTENT, 21)
    density = MIXTURE.log_density(torch.cartesian_prod(fine, fine)).exp().reshape(161, 161)
    at = torch.cartesian_prod(coarse, coarse)
    with torch.no_grad():
        true, learnt = MIXTURE.score(at), net(at, MIXTURE.sigma)
    learnt_title = f"learnt score\nrelative squared error {field_error(net):.3f}"
    figure, panels = _panels(["true score\nover the density", learnt_title], EXTENT + 0.5)
    levels, scale = float(density.max()) * np.linspace(0.02, 1, 12), float(true.norm(dim=1).max())
    for panel, field in zip(panels, (true, learnt), strict=True):
        panel.contourf(fine, fine, density.T, levels=levels, cmap="Blues")
        panel.quiver(*at.T, *field.T, angles="xy", scale_units="xy", scale=scale / 1.2, width=0.003)
    _save(figure, path)


def save_samples(samples: dict[str, Tensor], path: Path) -> None:
    """Writes a PNG with a panel per kind of samples, and their share at (5, 5) (figure 3)."""
    titles = [f"{name}\n{share(x):.2f} at (5, 5)" for name, x in samples.items()]
    figure, panels = _panels(titles, EXTENT + 1)
    for panel, x in zip(panels, samples.values(), strict=True):
        panel.scatter(*x.T, s=6, color="tab:blue", alpha=0.6, linewidths=0)
    _save(figure, path)


def train_and_draw(
    options: ToyOptions, folder: Path, stop: Sequence[int] = (), *, progress: bool = True
) -> tuple[bool, dict[str, float]]:
    """Trains and draws; writes config.json, fields.png, samples.png and figures.json.

    Returns whether training reached options.steps, and the figures: the error of the learnt field
    and the shares of samples at (5, 5).
    """
    with files.atomic_write(folder / "config.json") as path:
        path.write_text(options.to_json() + "\n")
    net, finished = fit(options, stop, progress=progress)
    save_fields(net, folder / "fields.png")
    samples = sample_all(net, options.n, options.seed)
    save_samples(samples, folder / "samples.png")
    figures = {"field error": field_error(net), **{k: share(x) for k, x in samples.items()}}
    with files.atomic_write(folder / "figures.json") as path:
        path.write_text(json.dumps(figures, indent=2) + "\n")
    return finished, figures
