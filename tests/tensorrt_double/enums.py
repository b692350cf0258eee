"""Enums of pybind11: members are instances of their own class, and no ints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class EnumType(type):
    """An enum of pybind11: instances of its own, which are no ints."""

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(f"TensorRT {cls._version} has no {cls.__qualname__}.{name}")


class Enum(metaclass=EnumType):
    __slots__ = ("__weakref__", "_value")
    _version: str
    _members: dict[str, int]
    _arithmetic: bool

    def __init__(self, value: int) -> None:
        object.__setattr__(self, "_value", int(value))

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
        if type(other) is type(self):
            return self._value == other._value
        return self._arithmetic and isinstance(other, int) and self._value == other

    def _compared(self, other: object, compare: Callable[[int, int], bool]) -> bool:
        if not self._arithmetic or not isinstance(other, (int, type(self))):
            return NotImplemented
        return compare(self._value, int(other))

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
