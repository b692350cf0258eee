"""Binding of arguments to recorded signatures, converted or rejected like in pybind11."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensorrt_double.dims import MAX_DIMS, Dims, as_int

UNSIGNED = {"flags", "pool_size", "stream_handle", "memory", "size"}  # size_t or uint32_t
_REFUSED = object()  # marks an argument that an overload rejects


def bind(api: Any, name: str, overloads: list[Any], args: Any, kwargs: Any) -> list[Any]:
    """Returns the arguments of the first overload that accepts them; TypeError if none does."""
    for one in overloads:
        arguments = one["arguments"]
        names = [argument[0] for argument in arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        surplus = len(args) > len(names) or set(kwargs) & set(names[: len(args)])
        if surplus or not set(given) <= set(names):
            continue
        bound = [convert(api, given, *argument) for argument in arguments]
        if not any(value is _REFUSED for value in bound):
            return [api.unwrap(value) for value in bound]
    shown = "\n".join(
        f"    {i}. ({', '.join(' '.join((a[0] + ':', *a[1:2])) for a in one['arguments'])})"
        for i, one in enumerate(overloads, 1)
    )
    raise TypeError(
        f"{name}(): incompatible function arguments. The following argument types are "
        f"supported:\n{shown}\n\nInvoked with: {args!r}, kwargs: {kwargs!r}"
    )


def convert(
    api: Any, given: dict[str, Any], name: str, kind: str, default: str | None = None
) -> Any:
    """Converts one argument to its type; returns the default if missing, or _REFUSED."""
    if name not in given:
        return _REFUSED if default is None else default_of(api, kind, default)
    value = given[name]
    if default == "None" and value is None:
        return None
    if kind == "int":
        number = as_int(value)
        return _REFUSED if number is None or (name in UNSIGNED and number < 0) else number
    if kind == "Dims":
        return as_dims(value)
    if kind == "buffer":
        return as_buffer(value)
    if kind.startswith("sequence["):
        items = list(value) if isinstance(value, (list, tuple)) else [_REFUSED]
        converted = [convert(api, {"": one}, "", kind[9:-1]) for one in items]
        return _REFUSED if any(one is _REFUSED for one in converted) else converted
    if kind in CHECKS:
        return CONVERT.get(kind, lambda same: same)(value) if CHECKS[kind](value) else _REFUSED
    known = api.names.get(kind, ())  # classes that the double lacks have no objects
    return value if isinstance(value, known) else _REFUSED


def default_of(api: Any, kind: str, text: str) -> Any:
    if kind in api.record["enums"]:
        return getattr(api.names[kind], text.rpartition(".")[2])
    known = {"None": None, "True": True, "False": False}
    return known[text] if text in known else int(text)


def as_dims(value: Any) -> Any:
    """Converts Dims, or a list or tuple of ints, to a list of ints."""
    if not isinstance(value, (list, tuple, Dims)) or len(value) > MAX_DIMS:
        return _REFUSED
    numbers = [as_int(one) for one in value]
    return _REFUSED if None in numbers else numbers


def as_buffer(value: Any) -> Any:
    try:
        return memoryview(value)
    except TypeError:
        return _REFUSED


CHECKS: dict[str, Callable[[Any], bool]] = {
    "bool": lambda value: value is None or hasattr(value, "__bool__"),
    "float": lambda value: hasattr(value, "__float__") or hasattr(value, "__index__"),
    "str": lambda value: isinstance(value, (str, bytes)),
    "tuple": lambda value: isinstance(value, tuple),
    "list": lambda value: isinstance(value, list),
    "object": lambda value: True,
}
CONVERT: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "str": lambda value: value.decode() if isinstance(value, bytes) else value,
}
