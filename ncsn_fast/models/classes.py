"""Labels of images without a class, for networks that take classes."""

from __future__ import annotations

from typing import Any, Protocol

from ncsn_fast.models.adapter import WrappedConfig


class Described(Protocol):
    """Description of a model."""

    @property
    def n_classes(self) -> int:
        """Number of classes of a network that takes labels; 0 for others."""


def takes_no_class(config: Described) -> bool:
    """Returns whether a network with classes takes the label n_classes, which means no class."""
    return not isinstance(config, WrappedConfig) or config.no_class


def default_label(config: Described) -> int | None:
    """Returns the label of images without one, as in checks of engines; None without classes.

    It means no class, or is a class where the network knows no images without one.
    """
    if not config.n_classes:
        return None
    return config.n_classes if takes_no_class(config) else 0


def require_labels(config: Described, labels: Any) -> None:
    """Raises ValueError for labels of None, where the network knows no images without one."""
    if labels is None and not takes_no_class(config):
        n = config.n_classes
        raise ValueError(
            f"this network takes one of its {n} classes and not the label {n}, which means none: "
            "give labels, or give its embedding one row more"
        )
