"""Recorded interface of a TensorRT version, as classes that reject everything else.

A class of the interface is a facade: it checks names, arguments and types like pybind11, and passes
the call to an implementation, a plain Python object that user code never sees.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import json
import sys
import types
import weakref
from pathlib import Path
from typing import Any

from tensorrt_double.behaviour import Behaviour
from tensorrt_double.binding import bind
from tensorrt_double.dims import Dims
from tensorrt_double.enums import make_enum

FILES = Path(__file__).parent.parent / "tensorrt_api"
PUBLIC_DUNDERS = ("__getitem__",)


def read(version: str) -> dict[str, Any]:
    """Reads the recorded interface of version "10.16" or "11.4"."""
    content: dict[str, Any] = json.loads((FILES / f"tensorrt-{version}.json").read_text())
    return content


class FacadeType(type):
    """Metaclass whose unknown names raise an error that names the TensorRT version.

    Requires __init__ to run.
    """

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(f"TensorRT {cls._api.version} has no {cls.__qualname__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not cls._constructible:
            raise TypeError(f"tensorrt.{cls.__name__}: No constructor defined!")
        made = super().__call__(*args, **kwargs)
        if made not in cls._api.implementations:
            base = next(c.__name__ for c in cls.__mro__ if "_record" in vars(c))
            raise TypeError(f"tensorrt.{base}.__init__() must be called when overriding __init__")
        return made


class Facade(metaclass=FacadeType):
    __slots__ = ("__weakref__",)
    _api: Api
    _constructible: bool

    def __getattr__(self, name: str) -> Any:
        owner = type(self).__name__
        raise AttributeError(f"{owner!r} object of TensorRT {self._api.version} has no {name!r}")

    def __bool__(self) -> bool:
        return bool(self._api.implementations[self])

    def __str__(self) -> str:
        return str(self._api.implementations[self])

    def __setattr__(self, name: str, value: Any) -> None:
        found = inspect.getattr_static(type(self), name, None)
        if isinstance(found, property) and found.fset is None:
            raise AttributeError(f"property {name!r} of {type(self).__name__!r} has no setter")
        try:
            super().__setattr__(name, value)
        except AttributeError as error:
            if isinstance(found, property):
                raise
            raise AttributeError(
                f"{type(self).__name__!r} object of TensorRT {self._api.version} has no {name!r}"
            ) from error


class Memory(bytearray):
    """Buffer provider of IHostMemory, which has nothing else of a bytearray."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in type(self)._record["names"]:
            raise AttributeError(f"'IHostMemory' object has no attribute {name!r}")
        return super().__getattribute__(name)

    def _refused(self, *_: Any) -> Any:
        raise TypeError("'IHostMemory' has only its buffer: take bytes() of it")

    __len__ = __iter__ = __getitem__ = __setitem__ = __contains__ = __add__ = _refused
    __iadd__ = __mul__ = __lt__ = __le__ = __gt__ = __ge__ = __mod__ = __delitem__ = _refused


class Api:
    """Module under construction: its classes and enums, and the implementations of its objects."""

    def __init__(self, version: str, behaviour: Behaviour) -> None:
        self.record = read(version)
        self.version = version
        self.behaviour = behaviour
        self.implementations: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._facades: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        enums = self.record["enums"].items()
        self.names: dict[str, Any] = {k: make_enum(k, v, version) for k, v in enums}
        self.names["Dims"] = Dims

    def member(self, path: str) -> Any:
        """Returns the member for `ILogger.Severity.ERROR`.

        AttributeError if this version has none.
        """
        enum, _, member = path.rpartition(".")
        return getattr(self.names[enum], member)

    def add_class(self, name: str, implementation: type) -> None:
        """Defines a class, after its bases; raises for methods that are not in the record."""
        record = self.record["classes"][name]
        self._check(name, record, implementation)
        base = self.names[record["base"]] if record["base"] else Facade
        constants = {k: self.member(path) for k, path in record["constants"].items()}
        virtual = getattr(implementation, "virtual", False)
        body: dict[str, Any] = {
            "__slots__": (), "__module__": "tensorrt", "_api": self, "_record": record,
            "_constructible": bool(record["constructors"]), **constants,
        }  # fmt: skip
        if record["constructors"]:
            body["__init__"] = self._constructor(record["constructors"], implementation)
        for method, overloads in record["methods"].items():
            body[method] = self._method(name, method, overloads, virtual)
        for prop, (kind, writable) in record["properties"].items():
            body[prop] = self._property(name, prop, kind, writable)
        if f"{name}.Severity" in self.names:
            body["Severity"] = self.names[f"{name}.Severity"]
        bases: tuple[type, ...] = (base,)
        if name == "IHostMemory":
            del body["__slots__"]
            bases = (Memory, Facade)
        self.names[name] = FacadeType(name, bases, body)

    def _check(self, name: str, record: dict[str, Any], implementation: type) -> None:
        """Raises unless an implementation's methods are in the record, with the same arguments."""
        elsewhere = getattr(implementation, "other_version", ())
        for key, value in inspect.getmembers(implementation):
            if key.startswith("_") and key not in PUBLIC_DUNDERS:
                continue
            if key in ("facade", "virtual", "other_version", "stored"):
                continue
            if key not in record["names"] and key not in PUBLIC_DUNDERS:
                if key in elsewhere:
                    continue
                raise TypeError(f"TensorRT {self.version} has no {name}.{key}")
            if inspect.isfunction(value):
                own = list(inspect.signature(value).parameters)[1:]
                known = [[a[0] for a in one["arguments"]] for one in record["methods"][key]]
                if own not in known:
                    raise TypeError(f"{name}.{key} takes {known}; the double has {own}")
        missing = set(getattr(implementation, "stored", ())) - {*record["names"], *elsewhere}
        if missing:
            raise TypeError(f"TensorRT {self.version} has no {missing} in {name}")

    def wrap(self, value: Any) -> Any:
        """Converts implementations to the objects that user code sees; always the same object."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.wrap(one) for one in value)
        name = getattr(type(value), "facade", None)
        if name is None:
            return value
        reference = self._facades.get(value)
        facade = reference() if reference else None
        if facade is None:
            kind = self.names[name]
            facade = kind.__new__(kind)
            if name == "IHostMemory":
                bytearray.__init__(facade, value._content)
            self._join(facade, value)
        return facade

    def _join(self, facade: Any, implementation: Any) -> None:
        self.implementations[facade] = implementation
        self._facades[implementation] = weakref.ref(facade)

    def unwrap(self, value: Any) -> Any:
        """Converts an argument to the object an implementation sees; loggers and monitors stay."""
        if not isinstance(value, (Facade, Memory)):
            return value
        implementation = self.implementations[value]
        return value if getattr(implementation, "virtual", False) else implementation

    def _constructor(self, overloads: list[Any], implementation: type) -> Any:
        records = [{"arguments": one} for one in overloads]

        def __init__(facade: Any, *args: Any, **kwargs: Any) -> None:
            given = bind(self, "__init__", records, args, kwargs)
            self._join(facade, implementation(self, *given))

        return __init__

    def _method(self, owner: str, name: str, overloads: Any, virtual: bool) -> Any:
        def method(facade: Any, *args: Any, **kwargs: Any) -> Any:
            given = [] if overloads is None else bind(self, name, overloads, args, kwargs)
            function = getattr(self.implementations[facade], name, None)
            if function is None and virtual:  # like TensorRT, it does not raise
                text = f'Tried to call pure virtual function "{owner}::{name}"'
                print(f"[ERROR] Exception caught in {name}(): {text}", file=sys.stderr)
                return False if overloads[0]["returns"] == "bool" else None
            if function is None:
                raise NotImplementedError(f"the double of TensorRT does not have {owner}.{name}")
            if len(given) != len(inspect.signature(function).parameters):
                raise NotImplementedError(f"the double has another overload of {owner}.{name}")
            return self.wrap(function(*given))

        method.__name__, method.__qualname__ = name, f"{owner}.{name}"
        return method

    def _property(self, owner: str, name: str, kind: str, writable: bool) -> property:
        def implemented(facade: Any) -> Any:
            implementation = self.implementations[facade]
            if not hasattr(implementation, name):
                raise NotImplementedError(f"the double of TensorRT does not have {owner}.{name}")
            return implementation

        def get(facade: Any) -> Any:
            return self.wrap(getattr(implemented(facade), name))

        def put(facade: Any, value: Any) -> None:
            record = [{"arguments": [["arg1", kind, *(["None"] if kind in self.names else [])]]}]
            if kind in self.record["enums"]:
                record = [{"arguments": [["arg1", kind]]}]
            (given,) = bind(self, name, record, (value,), {})
            setattr(implemented(facade), name, given)

        return property(get, put if writable else None)


class Module(types.ModuleType):
    """Module `tensorrt`: missing names raise an error that says whether the real one has them."""

    def __init__(self, api: Api, values: dict[str, Any]) -> None:
        super().__init__("tensorrt", f"A double of TensorRT {api.record['version']}, for tests.")
        public = {name: kind for name, kind in api.names.items() if "." not in name}
        constants = {name: api.member(path) for name, path in api.record["values"].items()}
        self.__dict__.update(public, **constants, **values)
        self.__dict__["__version__"] = api.record["version"]
        self.__dict__["__spec__"] = importlib.machinery.ModuleSpec("tensorrt", None)
        self.__dict__["_others"] = api.record["others"]

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_others"]:
            raise NotImplementedError(f"the double of TensorRT does not have {name}")
        version = self.__dict__["__version__"]
        raise AttributeError(f"module 'tensorrt' {version} has no attribute {name!r}")
