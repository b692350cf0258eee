"""Parsing of shape options: "1:64:256" images, sizes "32,32:64,64:128,128", a workspace in GB."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ncsn_fast.engines.tensorrt.builder import Size

T = TypeVar("T")


def parse_batch(text: str | int) -> tuple[int, int, int]:
    """Parses "1:64:256" as smallest, usual and largest number of images; "64" is all three."""
    form = "a number of images, or least:usual:largest"
    return _triple("batch", str(text), _count, form, lambda n: (n,))


def parse_size(text: str) -> tuple[Size, Size, Size]:
    """Parses "32,32:64,64:128,128" as smallest, usual and largest (H, W); "64,64" is all three."""
    return _triple("size", text, _pair, "H,W, or least:usual:largest of those", lambda pair: pair)


def parse_workspace(text: str | float) -> int:
    """Converts a number of GB to bytes."""
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < 1e6:
        raise ValueError(f"workspace must be a number of GB; got {text!r}")
    return int(gigabytes * 1e9)


def _triple(
    name: str,
    text: str,
    parse: Callable[[str], T],
    form: str,
    numbers: Callable[[T], tuple[int, ...]],
) -> tuple[T, T, T]:
    """Parses three values, or one for all three; their numbers must not decrease."""
    parts = text.split(":")
    try:
        least, usual, largest = map(parse, parts * 3 if len(parts) == 1 else parts)
        for a, b, c in zip(*map(numbers, (least, usual, largest)), strict=True):
            if not a <= b <= c:
                raise ValueError(text)
    except ValueError as error:
        raise ValueError(f"{name} must be {form}; got {text!r}") from error
    return least, usual, largest


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def _pair(text: str) -> Size:
    height, width = map(_count, text.split(","))
    return height, width
