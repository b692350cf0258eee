"""Who imports whom, and how long files and functions are."""

import ast
import functools
from pathlib import Path

import pytest
from paths import ROOT

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 300, 60

# Modules import from their own layer and from those above it in this list, never from below.
LAYERS = [
    {"_C", "noise", "reference", "sigmas", "sde", "files", "kernels"},
    {"_op_checks", "_extension", "_backends", "_cuda_ops", "ops", "cpu_ops", "native"},
    {"models", "objectives", "continuous", "samplers"},
    {"engines"},
    {"cli", "images", "data", "inputs", "batches", "configs", "checkpoint", "published", "loading",
     "watch", "jobs", "plan", "likelihood", "bits", "restorer", "editor", "sampler", "metrics",
     "fidelity", "features", "judge", "trainer", "options", "folders", "shards", "toy",
     "onnx_export", "trt_export"},
]  # fmt: skip
# The one way back, inside functions: save_pretrained and from_pretrained.
BACK = {("models.score", "checkpoint")}
COMMANDS = {
    "train", "sample", "edit", "evaluate", "export", "convert", "cache", "doctor", "__main__",
}  # fmt: skip


def sources() -> dict[str, Path]:
    """Dotted name below ncsn_fast -> file; "" is the package itself."""
    files = {}
    for top in (ROOT / "ncsn_fast", ROOT / "kernels"):
        for path in top.rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if parts[0] == "ncsn_fast" else parts
            files[".".join(p for p in parts if p != "__init__")] = path
    return files


SOURCES = sources()
KNOWN = {*SOURCES, "_C"}


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text())


def module_of(target: str) -> str | None:
    """The module below ncsn_fast that a dotted import names, or None for other packages."""
    if target.split(".")[0] != "ncsn_fast":
        return None
    name = target.removeprefix("ncsn_fast").removeprefix(".")
    while name and name not in KNOWN:
        name = name.rpartition(".")[0]
    return name


@functools.cache
def imports(name: str) -> set[str]:
    """Modules of ncsn_fast that a module imports, inside its functions too, but for BACK."""
    found: set[str | None] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {module_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: imports are absolute here"
            found |= {module_of(f"{node.module}.{alias.name}") for alias in node.names}
    modules = {module for module in found if module is not None} - {name}
    return {module for module in modules if (name, module) not in BACK}


def layer(name: str) -> int:
    top = name.split(".")[0]
    if top in COMMANDS or name == "":
        return len(LAYERS)
    return next(i for i, members in enumerate(LAYERS) if top in members)


def test_every_module_has_its_layer():
    tops = {name.split(".")[0] for name in SOURCES} - {""}
    assert tops | {"_C"} == set().union(*LAYERS) | COMMANDS


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down_the_layers(name):
    upward = {other for other in imports(name) if layer(other) > layer(name)}
    assert not upward, f"{name or 'ncsn_fast'} imports {sorted(upward)} from a layer above its own"


def test_kernels_stand_alone():
    for name in SOURCES:
        if name.split(".")[0] == "kernels":
            assert {other.split(".")[0] for other in imports(name)} <= {"kernels"}, name


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_nobody_imports_a_command(command):
    assert not {name for name in SOURCES if command in imports(name)}


def test_only_commands_import_the_whole_package():
    assert {name for name in SOURCES if "" in imports(name)} <= COMMANDS


def test_there_are_no_cycles():
    graph = {name: imports(name) & set(SOURCES) for name in SOURCES}
    while True:
        done = {name for name, needs in graph.items() if not needs}
        if not done:
            break
        graph = {name: needs - done for name, needs in graph.items() if name not in done}
    assert not graph, f"each of these waits for another: {sorted(graph)}"


def test_files_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    assert not {name: n for name, n in lengths.items() if n > MOST_LINES}


def test_functions_are_short():
    functions = {
        f"{name}.{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for name in SOURCES
        for node in ast.walk(tree(name))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert len(functions) > 100
    assert not {name: n for name, n in functions.items() if n > MOST_LINES_OF_A_FUNCTION}
