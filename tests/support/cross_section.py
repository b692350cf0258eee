"""Parameters of a test over a product, of which `make test` takes a cross-section."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

SLOW = pytest.mark.slow


def cross_section(
    *axes: Sequence[Any], where: Callable[..., bool] = lambda *values: True
) -> list[Any]:
    """The product of `axes` as parameters, all marked slow but a few that have every value once.

    The few are as many as the longest axis has values, and what is missing after them. Shorter axes
    turn like the digits of a counter, so that the few have different pairs of them, too.

    Args:
        where: combinations that there are.
    """
    product = [values for values in itertools.product(*axes) if where(*values)]
    longest, turns, columns = max(axes, key=len), 1, []
    for axis in axes:
        every = 1 if axis is longest else turns
        columns.append([axis[k // every % len(axis)] for k in range(len(longest))])
        turns *= 1 if axis is longest else len(axis)
    few, seen = [], set[tuple[int, Any]]()
    for values in (*filter(product.__contains__, zip(*columns, strict=True)), *product):
        if not seen.issuperset(enumerate(values)):
            few.append(values)
            seen.update(enumerate(values))
    return [pytest.param(*values, marks=[SLOW] * (values not in few)) for values in product]
