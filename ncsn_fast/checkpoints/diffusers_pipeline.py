"""Pipelines of diffusers in memory: a UNet2DModel and a scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard

from torch import nn

from ncsn_fast.checkpoints import diffusers_unet
from ncsn_fast.checkpoints.diffusers_folder import SCHEDULER, UNET, described_model, options_of
from ncsn_fast.models.score import ScoreModel

_PARTS = (UNET, SCHEDULER)


class Pipeline(Protocol):
    """A pipeline such as DDPMPipeline, DDIMPipeline or ScoreSdeVePipeline."""

    unet: nn.Module
    scheduler: Any


def is_pipeline(source: Any) -> TypeGuard[Pipeline]:
    """Whether a source has a network and a scheduler, as the pipelines of diffusers do."""
    parts = (getattr(source, name, None) for name in (UNET, SCHEDULER))
    return all(hasattr(part, "config") for part in parts)


def from_pipeline(pipeline: Pipeline, overrides: Mapping[str, Any]) -> ScoreModel:
    """ScoreModel of a pipeline's network, which is put in evaluation mode, and not copied.

    Args:
        overrides: as for `load_diffusers`.

    Raises:
        ValueError: the pipeline has other parts too, or a network or scheduler that is not known.
    """
    components = getattr(pipeline, "components", {})
    others = [n for n, part in components.items() if part is not None and n not in _PARTS]
    if others:
        raise ValueError(
            f"pipelines of a {UNET} and a {SCHEDULER} are read; {type(pipeline).__name__} has "
            f"{', '.join(others)}, too: latent and text-to-image models are none of this package"
        )
    net, scheduler = pipeline.unet, pipeline.scheduler
    config = {**_config(net), "_class_name": type(net).__name__}
    diffusers_unet.check_config(config, len(net.state_dict()))
    options = options_of({**_config(scheduler), "_class_name": type(scheduler).__name__})
    names = type(pipeline).__name__, type(scheduler).__name__
    return described_model(net, config, options, overrides, names)


def _config(part: Any) -> dict[str, Any]:
    """Returns the settings of a part, without diffusers' own notes about them."""
    return {name: value for name, value in dict(part.config).items() if name[:1] != "_"}
