"""Small models of every architecture, on images that are not square."""

from typing import Any

import tiny

from ncsn_fast.models.architectures import ARCHITECTURES, TIME_STYLE
from ncsn_fast.models.score import ScoreModel

TIME = {"unet_a": (0.01, 22.0), "unet_b": (1.0, 25.0), "unet_c": (1.0, 25.0)}
ARCHS = [*ARCHITECTURES, *TIME]


def model(arch: str = "ncsnv2", **fields: Any) -> ScoreModel:
    """Returns a tiny network of an architecture."""
    settings: dict[str, Any] = {"arch": arch, "image_size": (16, 24)}
    if arch in TIME:
        low, high = TIME[arch]
        settings |= {"image_size": (28, 36), "sigma_min": low, "sigma_max": high, **TIME_STYLE}
    return tiny.model(**{**settings, **fields})
