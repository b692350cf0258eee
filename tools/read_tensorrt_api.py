"""Extracts the Python interface of TensorRT from its bindings, without TensorRT.

    python tools/read_tensorrt_api.py            writes tests/support/tensorrt_api/tensorrt-*.json
    python tools/read_tensorrt_api.py --check    extracts it again, and fails if the files differ

TensorRT's libraries are not on PyPI, but the bindings are (tensorrt-cu13-bindings). They import
nine C functions. With stub libraries, built by gcc, that return null from each, the module loads,
and pybind11's docstrings give each method's arguments, types and defaults. Builder() and Runtime()
then raise `TypeError: pybind11::init(): factory function returned nullptr`, as in a real
installation without a driver: the tool asserts that. Needs pip, gcc and the network.

A file holds, per class, `constructors` and `methods` (for every overload its arguments as [name,
type] or [name, type, default], and its return type), `properties` ([type, writable]), `constants`
(aliases of enum members) and `base`; enums with their values; and the names of everything else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent.parent / "tests" / "support" / "tensorrt_api"
VERSIONS = ("10.16.1.11", "11.4.0.106")
CLASSES = (
    "Builder", "INetworkDefinition", "ITensor", "IBuilderConfig", "IOptimizationProfile",
    "ITimingCache", "IHostMemory", "OnnxParser", "ParserError", "Runtime", "ICudaEngine",
    "IExecutionContext", "EngineInspector", "Refitter", "OnnxParserRefitter", "ILogger", "Logger",
    "IProgressMonitor", "IErrorRecorder", "ISerializationConfig", "Dims",
)  # fmt: skip
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getPluginRegistry",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins",
)  # fmt: skip
LEAKED = {"attr", "value", "common_enter", "common_exit"}  # leftovers of the package's __init__
CPLUSPLUS = {  # C++ names, which pybind11 shows for types bound after their first use
    "IParserError": "ParserError", "IBuilder": "Builder", "IEngineInspector": "EngineInspector",
}  # fmt: skip
NULL = "pybind11::init(): factory function returned nullptr"


def plain(annotation: str) -> str:
    """Returns a type's Python name: `typing.SupportsInt` -> int, `nvinfer1::v_1_0::X` -> X."""
    for given, short in (
        ("typing.SupportsInt", "int"), ("typing.SupportsFloat", "float"),
        ("typing_extensions.Buffer", "buffer"), ("collections.abc.Sequence", "sequence"),
        ("typing_extensions.CapsuleType", "capsule"), ("tensorrt_bindings.tensorrt.", ""),
    ):  # fmt: skip
        annotation = annotation.replace(given, short)
    annotation = re.sub(r"(?:\w+::)+(\w+)", lambda m: CPLUSPLUS.get(m[1], m[1]), annotation)
    if not re.fullmatch(r"[\w.]+(\[[\w., \[\]]+\])?", annotation):
        raise SystemExit(f"unexpected type {annotation!r}")
    return annotation


def split(arguments: str) -> list[str]:
    """Splits at the commas outside brackets."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "[<(") - (character in "]>)")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def argument(text: str) -> list[str]:
    """Parses `flags: typing.SupportsInt = 0` to ["flags", "int", "0"]."""
    found = re.fullmatch(r"(\w+): (.*?)(?: = (.*))?", text)
    if found is None:
        raise SystemExit(f"unexpected argument {text!r}")
    name, annotation, default = found.groups()
    if default is None:
        return [name, plain(annotation)]
    return [name, plain(annotation), re.sub(r"<(.*): -?\d+>", r"\1", default)]


def signatures(doc: str) -> list[dict[str, Any]]:
    """Returns the overloads in a pybind11 docstring, without self."""
    lines = re.findall(r"^(?:\d+\. )?\w*\((.*)\) -> (.*)$", doc, re.MULTILINE)
    if not lines:
        raise SystemExit(f"no signature in {doc!r}")
    return [
        {"arguments": [argument(a) for a in split(given)[1:] if a != "/"], "returns": plain(back)}
        for given, back in lines
    ]


def written_type(prop: property) -> str:
    """Returns a property's type, from its setter if it has one: a getter's may lack a name."""
    doc = (prop.fset.__doc__ if prop.fset else prop.fget.__doc__) or ""
    found = re.search(r", (?:arg\d|\w+): (.*)\) -> " if prop.fset else r"-> (.*)", doc)
    return plain(found[1]) if found else "object"


def read_class(kind: type, enums: dict[type, str]) -> dict[str, Any]:
    base = kind.__mro__[1].__name__
    found: dict[str, Any] = {
        "base": None if base == "pybind11_object" else base,
        "constructors": [], "methods": {}, "properties": {}, "constants": {},
    }  # fmt: skip
    for name, value in sorted(vars(kind).items()):
        hidden = name.startswith("_") and name not in ("__init__", "__getitem__")
        if hidden or isinstance(value, type):
            continue
        if isinstance(value, property):
            found["properties"][name] = [written_type(value), value.fset is not None]
        elif type(value) in enums:
            found["constants"][name] = f"{enums[type(value)]}.{value.name}"
        elif type(value).__name__ == "instancemethod":
            overloads = signatures(value.__doc__)
            if name == "__init__":
                found["constructors"] = [one["arguments"] for one in overloads]
            else:  # a parsed network adds no layers: of the methods that do, only the names
                layer = kind.__name__ == "INetworkDefinition" and name.startswith("add_")
                found["methods"][name] = None if layer else overloads
    own = {*found["methods"], *found["properties"], *found["constants"]}
    listed = {name for name in vars(kind) if not name.startswith("_")}
    nested = {name for name in listed if isinstance(vars(kind)[name], type)}
    if own - {"__getitem__"} != listed - nested:
        raise SystemExit(f"{kind.__name__}: {sorted(own ^ listed)} are no methods or properties")
    found["names"] = sorted(name for name in dir(kind) if not name.startswith("_"))
    return found


def read(version: str) -> dict[str, Any]:
    """Extracts everything from the module importable as tensorrt_bindings."""
    trt: Any = importlib.import_module("tensorrt_bindings")
    if trt.__version__ != version:
        raise SystemExit(f"expected {version}, got {trt.__version__}")
    for kind in (trt.Builder, trt.Runtime):
        told = None
        try:
            kind(trt.Logger(trt.Logger.INTERNAL_ERROR))
        except TypeError as error:
            told = str(error)
        if told != NULL:
            raise SystemExit(f"{kind} on dummy libraries: expected {NULL!r}, got {told!r}")
    public = {name: v for name, v in vars(trt.tensorrt).items() if not name.startswith("_")}
    public |= {name: v for name, v in vars(trt).items() if not name.startswith("_")}
    module_type = type(trt)
    public = {
        name: value
        for name, value in public.items()
        if not isinstance(value, module_type) and name not in LEAKED
    }
    members = {name: v for name, v in public.items() if hasattr(v, "__members__")}
    members["ILogger.Severity"] = trt.ILogger.Severity
    named = {kind: name for name, kind in members.items() if isinstance(kind, type)}
    return {
        "version": version,
        "classes": {name: read_class(getattr(trt, name), named) for name in CLASSES},
        "enums": {
            name: {
                "arithmetic": "__lt__" in vars(kind),
                "members": {k: int(v) for k, v in kind.__members__.items()},
            }
            for name, kind in sorted(members.items())
            if isinstance(kind, type)
        },
        "values": {
            name: f"{named[type(value)]}.{value.name}"
            for name, value in sorted(public.items())
            if type(value) in named
        },
        "others": sorted(
            name
            for name, value in public.items()
            if name not in members and name not in CLASSES and type(value) not in named
        ),
    }


def read_apart(version: str) -> dict[str, Any]:
    """Runs `read` in its own process, with the wheel and stub libraries of a version."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = f"tensorrt-cu13-bindings=={version}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", name]
        subprocess.run([*pip, "--only-binary=:all:", wheel], check=True)
        source = folder / "null.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            file = f"lib{library}.so.{version.split('.')[0]}"
            made = ["gcc", "-shared", "-fPIC", source, f"-Wl,-soname,{file}", "-o", folder / file]
            subprocess.run(made, check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": name, "PYTHONPATH": name}
        result = subprocess.run(
            [sys.executable, __file__, "--read", version],
            env=environment, stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def layout(value: Any, depth: int = 0) -> str:
    """Formats JSON with one method, property or enum per line."""
    if isinstance(value, dict) and value and depth < 4 and "members" not in value:
        rows = (f'{" " * (depth + 1)}"{k}": {layout(v, depth + 1)}' for k, v in value.items())
        return "{\n" + ",\n".join(rows) + f"\n{' ' * depth}}}"
    return json.dumps(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Reads TensorRT's Python interface.")
    parser.add_argument("--check", action="store_true", help="compare with the files")
    parser.add_argument("--read", metavar="VERSION", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read)))
        return
    for version in VERSIONS:
        path = OUT / f"tensorrt-{'.'.join(version.split('.')[:2])}.json"
        text = layout(read_apart(version)) + "\n"
        if not arguments.check:
            path.write_text(text)
        elif path.read_text() != text:
            raise SystemExit(f"{path} differs; run {Path(__file__).name} and review the change")


if __name__ == "__main__":
    main()
