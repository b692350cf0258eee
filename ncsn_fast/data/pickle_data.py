"""Pickles read as data: no name in them is looked up, and nothing of theirs is called.

The unpickler of Python imports what a pickle names, and calls it. The one here knows the opcodes of
data; for a name it takes a builder from a table that its caller gives, and refuses all others.
"""

from __future__ import annotations

import dataclasses
import mmap
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple, cast

Builder = Callable[..., Any]


class PickleError(ValueError):
    """A pickle that holds more than data, or is damaged."""


class Name(NamedTuple):
    """Name of a class or function, as a pickle gives it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False)
class Instance:
    """Object of a class: the arguments that made it, and the state that it was given."""

    kind: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


def instance_of(kind: str) -> Builder:
    """Returns a builder of an Instance of a class."""
    return lambda *arguments: Instance(kind, arguments)


def load(
    file: IO[bytes] | mmap.mmap,
    builders: Mapping[str, Builder],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Reads one pickle, and leaves the file at its end.

    Args:
        builders: for each name that is known, "module.name", a function of the arguments that the
            pickle has for it.
        persistent: the function of persistent ids, which some pickles have for large objects.

    Raises:
        PickleError: another name, or another opcode.
        Exception: damaged pickles raise nearly anything.
    """
    return _Machine(builders, persistent).run(file)


_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_VALUES = frozenset((
    "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "STRING", "BINSTRING", "SHORT_BINSTRING",
))  # fmt: skip
_IGNORED = frozenset(("PROTO", "FRAME"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(
        self, builders: Mapping[str, Builder], persistent: Callable[[Any], Any] | None
    ) -> None:
        self.builders, self.persistent = builders, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: IO[bytes] | mmap.mmap) -> Any:
        stack = self.stack
        argument: Any
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], file)):
            name: str = opcode.name
            if name in _VALUES:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name == "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self.memo[argument] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(self.memo[argument])
            elif name in _TUPLES:
                self.push_tuple(_TUPLES[name])
            elif name == "STOP":
                break
            elif name not in _IGNORED:
                self.change(name, argument)
        if len(stack) != 1 or stack[0] is _MARK:
            raise PickleError("its opcodes do not make one object")
        return stack[0]

    def change(self, opcode: str, argument: Any) -> None:
        """Runs one of the opcodes that take something from the stack."""
        stack = self.stack
        if opcode == "TUPLE":
            stack.append(tuple(self.marked()))
        elif opcode in ("LIST", "FROZENSET"):
            stack.append((list if opcode == "LIST" else frozenset)(self.marked()))
        elif opcode in ("APPEND", "APPENDS"):
            values = self.marked() if opcode == "APPENDS" else [stack.pop()]
            self.target(list).extend(values)
        elif opcode == "ADDITEMS":
            values = self.marked()
            self.target(set).update(values)
        elif opcode in ("SETITEM", "SETITEMS", "DICT"):
            values = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else self.marked()
            if opcode == "DICT":
                stack.append({})
            self.target(dict).update(zip(values[::2], values[1::2], strict=True))
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            names = argument.split(" ", 1) if opcode == "GLOBAL" else (stack.pop(-2), stack.pop())
            self.push_name(*names)
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments, made = stack.pop(), stack.pop()
            self.push_built(made, arguments)
        elif opcode == "BUILD":
            state = stack.pop()
            self.target(Instance).state = state
        elif opcode == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        else:
            raise PickleError(f"it has the opcode {opcode}, which data do not need")

    def marked(self) -> list[Any]:
        """Takes everything above the last mark, and the mark."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def target(self, kind: type) -> Any:
        """Returns the top of the stack, which must be of a kind."""
        if type(self.stack[-1]) is not kind:
            raise PickleError(f"it changes a {type(self.stack[-1]).__name__} as a {kind.__name__}")
        return self.stack[-1]

    def push_tuple(self, n: int) -> None:
        values = tuple(self.stack[-n:])
        if len(values) < n:
            raise PickleError("a tuple lacks values")
        self.stack[-n:] = [values]

    def push_name(self, module: Any, name: Any) -> None:
        found = Name(str(module), str(name))
        if str(found) not in self.builders:
            raise PickleError(f"it names {found!s:.80}")
        self.stack.append(found)

    def push_built(self, made: Any, arguments: Any) -> None:
        if type(made) is not Name or type(arguments) is not tuple:
            raise PickleError("it calls something that is no name")
        self.stack.append(self.builders[str(made)](*arguments))
