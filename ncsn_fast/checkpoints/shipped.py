"""Models that ship with the package: every folder of ncsn_fast/assets that holds a model.

A new one needs nothing but its folder (tools/ship_model.py makes it) and its traced graph
(tools/store_graphs.py).
"""

from __future__ import annotations

from pathlib import Path

from ncsn_fast.checkpoints.model_folder import CONFIG_NAME

ASSETS = Path(__file__).parents[1] / "assets"
DEFAULT = "digits"  # what Sampler() takes where there is no run


def shipped() -> dict[str, Path]:
    """Returns the folders of the models that ship, by name."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob(f"*/{CONFIG_NAME}"))}
