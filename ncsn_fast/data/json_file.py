"""JSON files, read strictly: what they hold is plain data of a bounded size, or an error.

`plain` and `make_plain` are for what is to be written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import numbers
from pathlib import Path
from typing import Any

import numpy as np

from ncsn_fast.data import files, limits

_MOST_DIGITS = len(str(-(2**63)))


class JSONError(ValueError):
    """A file or text that is not the JSON that it should be; the message says which and why."""


def read_json(
    path: Path, *, finite: bool = True, limit: limits.Limit = limits.JSON_BYTES
) -> dict[str, Any]:
    """Returns the object in a JSON file; see parse_json.

    Raises:
        JSONError: also for pipes, devices and files beyond the limit.
        FileNotFoundError: there is no such file.
    """
    try:
        with files.open_regular(path, limit) as file:
            text = file.read(limit.value()).decode()
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise JSONError(f"cannot read {path}: {error}") from error
    return parse_json(text, str(path), finite=finite)


def find_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file of a cache; None if there is none, or it is damaged."""
    try:
        return read_json(path)
    except (OSError, JSONError):
        return None


def parse_json(text: str, where: str, *, finite: bool = True) -> dict[str, Any]:
    """Returns the object in a text: integers of 64 bits, finite numbers, unique names.

    Args:
        where: for messages.
        finite: False accepts NaN, Infinity and numbers that round to it.

    Raises:
        JSONError: the text is something else.
    """

    def integer(digits: str) -> int:
        if len(digits) > _MOST_DIGITS or not -(2**63) <= int(digits) < 2**63:
            raise ValueError(f"the integer {_short(digits)} has more than 64 bits")
        return int(digits)

    def number(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise ValueError(f"the number {_short(digits)} is not finite")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{_short(twice)!r} is there twice")
        return values

    try:
        found = json.loads(
            text, parse_int=integer, parse_float=number, parse_constant=number,
            object_pairs_hook=unique,
        )  # fmt: skip
    except RecursionError as error:
        raise JSONError(f"cannot use {where}: it is nested too deeply") from error
    except ValueError as error:
        raise JSONError(f"cannot use {where}: {error}") from error
    if not isinstance(found, dict):
        raise JSONError(f"cannot use {where}: expected a JSON object; got {type(found).__name__}")
    return found


def plain(value: Any) -> Any:
    """Returns a number of any type, NumPy's above all, as Python's own, which JSON can hold.

    Tuples, lists and dicts are converted element by element; everything else is returned as it is.
    """
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value))
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def make_plain(config: Any) -> None:
    """Makes all numbers of a dataclass `plain`, and floats where its fields are; also a frozen one.

    It is for `__post_init__`, before the values are checked.
    """
    for field in dataclasses.fields(config):
        value = plain(getattr(config, field.name))
        if field.type == "float" and type(value) is int:
            with contextlib.suppress(OverflowError):  # the check of its range will refuse it
                value = float(value)
        object.__setattr__(config, field.name, value)


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}..."
