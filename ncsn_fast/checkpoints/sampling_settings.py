"""Image size and Langevin steps of checkpoints that hold weights alone."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from ncsn_fast.diffusion import schedule as ladders
from ncsn_fast.models.architectures import TIME_ARCHS
from ncsn_fast.models.published_runs import PUBLISHED_RUNS, PublishedRun
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.notices import notice

log = logging.getLogger(__name__)
_DEFAULT_SIZE = {
    "ncsnv2": 32,
    "ncsnv2_deeper": 128,
    "ncsnv2_deepest": 256,
    "ncsn": 32,
    "ncsn_deeper": 64,
    **dict.fromkeys(TIME_ARCHS, 28),
}


def with_sampling_settings(found: dict[str, Any]) -> dict[str, Any]:
    """Adds image size and Langevin steps to the fields of ModelConfig that are known.

    They are those of the published run with the same network and noise levels; without one, the
    usual size of the architecture and the step size of Technique 4.
    """
    for name, run in PUBLISHED_RUNS.items():
        if _same_run(run, found):
            size = (run.image_size, run.image_size)
            steps, epsilon = run.n_steps_each, run.epsilon
            said = f"those of the published run {name}"
            break
    else:
        said = f"usual ones, because no published {found['arch']} has these noise levels and widths"
        mnist = found["channels"] == 1 and found["ngf"] == 64
        side = 28 if mnist else _DEFAULT_SIZE.get(found["arch"], 32)
        size, steps, epsilon = (side, side), 100, 2e-5
        if found["arch"] not in ("ncsn", "ncsn_deeper"):
            steps = found.get("n_steps_each", 5)
            ladder = ladders.geometric(found["sigma_begin"], found["sigma_end"], found["n_sigmas"])
            epsilon = ladders.epsilon_for(ladder, steps)
    notice(log, "unless given: image size %d, %d Langevin steps, %s", size[0], steps, said)
    return {"image_size": size, "epsilon": epsilon, "n_steps_each": steps, **found}


_LADDER = ("n_sigmas", "sigma_begin", "sigma_end", "n_steps_each")


def with_ladder(config: UNetConfig, changes: Mapping[str, Any]) -> UNetConfig:
    """Returns a description with other noise levels or Langevin steps.

    Epsilon is that of Technique 4 for the new levels, unless it is given. ValueError names what
    else was to be changed.
    """
    known = (*_LADDER, "epsilon", "langevin_form")
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(
            f"the file says what {', '.join(unknown)} is; {', '.join(known)} can be given"
        )
    changed = dataclasses.replace(config, **changes)
    if "epsilon" in changes or not set(_LADDER) & set(changes):
        return changed
    ladder = changed.ladder().double().numpy()
    epsilon = ladders.usual_epsilon(ladder, changed.n_steps_each)
    return dataclasses.replace(changed, epsilon=epsilon)


def _same_run(run: PublishedRun, found: dict[str, Any]) -> bool:
    exact = all(found[key] == getattr(run, key) for key in ("arch", "channels", "ngf", "n_sigmas"))
    return exact and abs(found["sigma_begin"] / run.sigma_begin - 1) < 1e-3
