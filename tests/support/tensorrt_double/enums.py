"""Enums as in pybind11: members are instances of their own class, not ints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensorrt_double.dims import as_int


class EnumType(type):
    """Metaclass of enums as in pybind11: iterable over members, which are not ints."""

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(f"TensorRT {cls._version} has no {cls.__qualname__}.{name}")


class Enum(metaclass=EnumType):
    """Enum member: equal only to itself, ordered within the enum if at all, never combined."""

    __slots__ = ("__weakref__", "_value")
    _version: str
    _members: dict[str, int]
    _arithmetic: bool

    def __init__(self, value: int) -> None:
        number = as_int(value)
        if number is None:
            raise TypeError(f"__init__(): incompatible constructor arguments. Got: {value!r}")
        object.__setattr__(self, "_value", number)

    @property
    def name(self) -> str:
        return next((k for k, v in self._members.items() if v == self._value), "???")

    @property
    def value(self) -> int:
        return self._value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__qualname__!r} object has no attribute {name!r}")

    def __int__(self) -> int:
        return self._value

    __index__ = __int__

    def __hash__(self) -> int:
        return hash(self._value)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._value == other._value

    def _compared(self, other: object, compare: Callable[[int, int], bool]) -> bool:
        if not self._arithmetic:
            return NotImplemented
        if type(other) is not type(self):
            raise TypeError("Expected an enumeration of matching type!")
        return compare(self._value, other._value)

    def __lt__(self, other: object) -> bool:
        return self._compared(other, int.__lt__)

    def __le__(self, other: object) -> bool:
        return self._compared(other, int.__le__)

    def __gt__(self, other: object) -> bool:
        return self._compared(other, int.__gt__)

    def __ge__(self, other: object) -> bool:
        return self._compared(other, int.__ge__)

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}: {self._value}>"


def make_enum(name: str, record: dict[str, Any], version: str) -> type[Enum]:
    short = name.rpartition(".")[2]
    body = {
        "__slots__": (), "__qualname__": name, "__module__": "tensorrt", "_version": version,
        "_members": record["members"], "_arithmetic": record["arithmetic"],
    }  # fmt: skip
    kind: Any = EnumType(short, (Enum,), body)
    members = {member: kind(value) for member, value in record["members"].items()}
    for member, instance in {**members, "__members__": members}.items():
        setattr(kind, member, instance)
    return kind
