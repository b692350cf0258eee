"""Samplers in the form of k-diffusion, `function(model, x, sigmas, ...) -> x`, as procedures.

`model(x, sigma, **extra_args)` is the denoised image D = x + sigma^2 score(x, sigma), sigma (B,),
and sigmas (L + 1,) descend to 0. Noise follows the noise contract where the function takes a
`noise_sampler(sigma, sigma_next)`: its k-th call draws step k of stream 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line lists methods before torch is imported
    from torch import Tensor

    from ncsn_fast.models.score import ScoreModel
    from ncsn_fast.samplers.level_selection import Levels
    from ncsn_fast.samplers.procedure import Constrain, OnStep, Procedure, Result, Score
    from ncsn_fast.samplers.program import Chains

STEPS = 20  # levels, if the caller gives none
_FIRST = ("model", "x", "sigmas")
_OURS = ("extra_args", "callback", "disable", "noise_sampler")
_CHURN = "s_churn"


def procedure(
    function: Callable[..., Tensor], model: ScoreModel, levels: Levels, options: Mapping[str, Any]
) -> Procedure:
    """Returns the procedure that runs a function of k-diffusion's form down to noise level 0.

    Args:
        levels: between_the_ends are the sigmas; 0 is added.
        options: keyword arguments of the function.

    Raises:
        ValueError: it is not of this form, has no such option, or draws noise of its own.
    """
    import numpy as np
    import torch

    from ncsn_fast.samplers.procedure import Procedure, Result, chains_noise, per_sample
    from ncsn_fast.samplers.program import Stream

    name, parameters = _check(function, options)
    ladder = levels.between_the_ends(model)

    def solve(score: Score, chains: Chains, _: Constrain | None, on_step: OnStep | None) -> Result:
        draw, drawn, evaluations = chains_noise(chains), 0, 0
        sigmas = torch.tensor([*ladder, 0.0], dtype=torch.float32, device=chains.x.device)

        def denoised(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return x + per_sample(sigma, x).square() * score(x, sigma)

        def noise_sampler(*_: Any) -> Tensor:
            nonlocal drawn
            drawn += 1
            return draw(Stream.SAMPLER, drawn - 1)

        def callback(found: Mapping[str, Any]) -> None:
            assert on_step is not None
            on_step(evaluations, float(found["sigma"]), found["x"])

        ours = {"extra_args": {}, "disable": True, "noise_sampler": noise_sampler}
        if on_step is not None:
            ours["callback"] = callback
        known = {key: value for key, value in ours.items() if key in parameters}
        x = function(denoised, chains.x, sigmas, **known, **options)
        return Result(x, torch.full((len(x),), evaluations))

    stochastic = "noise_sampler" in parameters
    return Procedure(name, np.asarray(ladder), None, solve, draws_noise=stochastic)


def _check(
    function: Callable[..., Any], options: Mapping[str, Any]
) -> tuple[str, Mapping[str, inspect.Parameter]]:
    """Returns name and parameters of a function of this form; ValueError for another."""
    name = getattr(function, "__name__", type(function).__name__)
    parameters = inspect.signature(function).parameters
    if tuple(parameters)[: len(_FIRST)] != _FIRST:
        raise ValueError(
            f"a method that is a function takes ({', '.join(_FIRST)}, ...), as those of "
            f"k-diffusion do; got {name}({', '.join(parameters)})"
        )
    own = [key for key in parameters if key not in (*_FIRST, *_OURS)]
    unknown = sorted(set(options) - set(own))
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(unknown)}; it has {', '.join(own) or 'none'}"
        )
    if options.get(_CHURN) and "noise_sampler" not in parameters:
        raise ValueError(
            f"{name} draws the noise of {_CHURN} by itself, so that a sample would depend on its "
            "batch; method='heun' with churn= does this by the noise contract"
        )
    return name, parameters
