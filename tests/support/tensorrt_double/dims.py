"""Dims: a sequence that, as in pybind11, equals lists and tuples only."""

from __future__ import annotations

from typing import Any

MAX_DIMS = 8


def as_int(value: Any) -> int | None:
    """Converts what pybind11 accepts as an int: anything with __index__ or __int__ but floats."""
    if isinstance(value, float) or not (hasattr(value, "__index__") or hasattr(value, "__int__")):
        return None
    try:
        return int(value)
    except (TypeError, ValueError, RuntimeError):  # an array of several elements
        return None


class Dims:
    __slots__ = ("_shape",)
    __hash__ = None  # type: ignore[assignment]
    MAX_DIMS = MAX_DIMS

    def __init__(self, shape: Any = ()) -> None:
        numbers = [as_int(one) for one in shape] if hasattr(shape, "__len__") else [None]
        if None in numbers or isinstance(shape, (str, bytes)):
            raise TypeError(f"__init__(): incompatible constructor arguments. Got: {shape!r}")
        if len(numbers) > MAX_DIMS:
            raise ValueError(f"Input length {len(numbers)}. Max expected length is {MAX_DIMS}")
        object.__setattr__(self, "_shape", numbers)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"'Dims' object has no attribute {name!r}")

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self._shape[index])
        if not -len(self) <= index < len(self):
            raise IndexError("Out of bounds")
        return self._shape[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._shape[index] = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, tuple)):
            raise TypeError(f"__eq__(): incompatible function arguments. Invoked with: {other!r}")
        return self._shape == list(other)

    def __repr__(self) -> str:
        return str(tuple(self._shape))
