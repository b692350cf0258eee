"""The order of the folders, held by their imports; and how long files and functions are."""

import ast
import functools
import re
from pathlib import Path

import pytest
from paths import ROOT

LONG_FILE, LONG_FUNCTION = 500, 60

# Each name is a folder or a file of ncsn_fast/. A module imports from its own folder and from rows
# above its own, never from below; folders of one row do not import each other.
ORDER = [
    ("_C", "kernels", "names", "notices"),
    ("ops", "data", "diffusion"),
    ("models",),
    ("checkpoints",),
    ("samplers",),
    ("engines",),
    ("inference",),
    ("evaluation", "exporters"),
    ("sampler",),
    ("training",),
    ("cli",),
    (
        "train",
        "sample",
        "edit",
        "evaluate",
        "tune",
        "export",
        "convert",
        "cache",
        "doctor",
        "__main__",
    ),
]
# The same for engines/: a row of modules, or a folder.
ENGINES_ORDER = [
    ("torch_settings", "probe_images", "installation", "weights", "batch_sizes"),
    ("base",),
    ("eager", "lowering"),
    ("precision", "verdicts"),
    ("static_engine", "reference_check"),
    ("compiled", "cpu"),
    ("cuda",),
    ("onnx",),
    ("tensorrt",),
    ("",),  # the registry, engines/__init__.py
]
COMMANDS = ORDER[-1]


def sources() -> dict[str, Path]:
    """Dotted name below ncsn_fast -> file; "" is the package itself."""
    files = {}
    for top in (ROOT / "ncsn_fast", ROOT / "kernels"):
        for path in top.rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if parts[0] == "ncsn_fast" else parts
            if parts[0] != "kernels" or top.name == "kernels":  # a build in place links them
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
def imports(name: str) -> frozenset[str]:
    """Modules of ncsn_fast that a module imports, inside its functions too."""
    found: set[str | None] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {module_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: imports are absolute here"
            found |= {module_of(f"{node.module}.{alias.name}") for alias in node.names}
    return frozenset({module for module in found if module is not None} - {name})


def row(name: str, order: list[tuple[str, ...]]) -> int:
    return next(i for i, members in enumerate(order) if name in members)


def upward(name: str, others: set[str], order: list[tuple[str, ...]]) -> set[str]:
    """Those of `others` that a member of the order must not import."""
    here = row(name, order)
    return {other for other in others - {name} if row(other, order) >= here}


def test_every_folder_and_file_has_its_place():
    tops = {name.split(".")[0] for name in SOURCES} - {""}
    assert sorted(tops | {"_C"}) == sorted(name for members in ORDER for name in members)
    inner = {name.split(".")[1] for name in SOURCES if name.startswith("engines.")}
    assert sorted(inner | {""}) == sorted(name for members in ENGINES_ORDER for name in members)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {""}))
def test_imports_follow_the_order(name):
    tops = {other.split(".")[0] for other in imports(name)} - {""}
    wrong = upward(name.split(".")[0], tops, ORDER)
    assert not wrong, f"{name} imports from {sorted(wrong)}, which comes after it"


@pytest.mark.parametrize("name", [n for n in sorted(SOURCES) if n.split(".")[0] == "engines"])
def test_imports_follow_the_order_of_engines(name):
    def inner(module: str) -> str:
        return f"{module}..".split(".")[1]

    others = {inner(other) for other in imports(name) if other.split(".")[0] == "engines"}
    wrong = upward(inner(name), others, ENGINES_ORDER)
    assert not wrong, f"{name} imports from engines' {sorted(wrong)}, which comes after it"


def test_kernels_stand_alone():
    for name in SOURCES:
        if name.split(".")[0] == "kernels":
            assert {other.split(".")[0] for other in imports(name)} <= {"kernels"}, name


@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_imports_a_command(command):
    assert not {name for name in SOURCES if command in imports(name)}


def test_only_commands_import_the_whole_package():
    assert {name for name in SOURCES if "" in imports(name)} <= set(COMMANDS)


# Modules that take addresses of memory, and why. All others pass tensors to ops/addresses.py.
ADDRESSES = {
    "ops.addresses": "checks every tensor that C++ is given",
    "kernels.pool5": "compares two; Triton itself is given tensors",
    "engines.onnx.engine": "binds buffers that it has made to ONNX Runtime",
    "engines.tensorrt.runtime": "binds buffers that it has made to TensorRT",
}
# Attributes of tensors and arrays that give one.
TAKES_AN_ADDRESS = {
    "data_ptr", "const_data_ptr", "mutable_data_ptr", "ctypes", "__array_interface__",
    "__cuda_array_interface__",
}  # fmt: skip
# Modules that call kernels of the extension, and its functions that take no memory.
CALLS_C = {
    "ops.extension", "ops.cpu", "ops.native", "ops.tiles", "engines.cpu.memory",
    "engines.cpu.onednn",
}  # fmt: skip
TELLS = {
    "build_info", "isa_levels", "default_isa", "amx_state", "cuda_device_count", "set_num_threads",
    "__file__",
}  # fmt: skip


def test_addresses_are_taken_in_one_place():
    takers, callers = set(), set()
    for name in SOURCES:
        nodes = list(ast.walk(tree(name)))
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        constants = {node.value for node in nodes if isinstance(node, ast.Constant)}  # of getattr
        if TAKES_AN_ADDRESS & ({node.attr for node in attributes} | constants):
            takers.add(name)
        telling = {id(node.value) for node in attributes if node.attr in TELLS}
        names = [node for node in nodes if isinstance(node, ast.Name) and node.id == "_C"]
        if any(id(node) not in telling for node in names):
            callers.add(name)
    assert takers == set(ADDRESSES)
    assert callers == CALLS_C


def test_only_kernels_and_commands_are_imported_by_name():
    """An import that is computed would hide an arrow from these tests."""
    for name, path in SOURCES.items():
        found = re.findall(
            r"(?:import_module|__import__)\(\s*f?.(ncsn_fast[.\w]*)", path.read_text()
        )
        commands = {"ncsn_fast.", "ncsn_fast.cli."}  # a command, and its options
        allowed = commands if name == "cli.command" else {"ncsn_fast.kernels."}
        assert set(found) <= allowed, name


def test_there_are_no_cycles():
    graph = {name: imports(name) & set(SOURCES) for name in SOURCES}
    while True:
        done = {name for name, needs in graph.items() if not needs}
        if not done:
            break
        graph = {name: needs - done for name, needs in graph.items() if name not in done}
    assert not graph, f"each of these waits for another: {sorted(graph)}"


def test_long_files_are_known():
    """A file past 500 lines deserves a look: does it hold two ideas?"""
    lengths = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    assert not {name: n for name, n in lengths.items() if n > LONG_FILE}


def lines(node):
    """Number of lines of a node."""
    return node.end_lineno - node.lineno + 1


def test_functions_are_short():
    """Docstrings, which explain every parameter of a public function, do not count."""
    functions = {
        f"{name}.{node.name}": lines(node) - (lines(node.body[0]) if ast.get_docstring(node) else 0)
        for name in SOURCES
        for node in ast.walk(tree(name))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert len(functions) > 100
    assert not {name: n for name, n in functions.items() if n > LONG_FUNCTION}


def test_tests_lie_where_the_tested_lies():
    """tests/ has the folders of ncsn_fast/, and a few for what is no module of it."""
    others = {"commands", "fuzz", "golden", "kernels", "support", "tools"}
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name[0] not in "._"}
    tested = {p.name for p in (ROOT / "ncsn_fast").iterdir() if p.is_dir()}
    assert folders <= tested | others


def documented_tree() -> set[str]:
    """Folders and files that ARCHITECTURE.md's tree names, as paths from the root."""
    block = (ROOT / "ARCHITECTURE.md").read_text().split("```")[1]
    found, parents = set(), [""]
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip(" "))) // 2
        names = re.match(r"[\w./ -]*?(?=\s{4,}|\s{2,}\S+ |$)", line.strip())
        assert names, line
        del parents[depth + 1 :]
        for name in names[0].split():
            found.add(parents[depth] + name.rstrip("/"))
            if name.endswith("/"):
                parents.append(parents[depth] + name)
    return found


def test_the_tree_in_the_documentation_is_the_tree_of_folders():
    named = documented_tree()
    missing = {path for path in named if not (ROOT / path).exists()}
    assert not missing
    folders = set()
    for top in ("kernels", "csrc", "ncsn_fast", "benchmarks", "tests", "tools", "docs", "cmake"):
        folders.add(top)
        if top == "tests":  # those of ncsn_fast/
            continue
        for path in (ROOT / top).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_dir() and not re.search(r"__pycache__|/\.|assets/|/kernels$", name):
                folders.add(name)
    folders.remove("csrc/include")  # named with its only folder
    assert folders == {path for path in named if (ROOT / path).is_dir()}
    commands = {f"ncsn_fast/{name}.py" for name in COMMANDS if name != "__main__"}
    assert commands < named


def test_files_that_the_documentation_names_exist():
    """Paths in ARCHITECTURE.md and CONTRIBUTING.md, from the root, ncsn_fast/ or engines/."""
    for page in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
        paths = set(
            re.findall(r"`([\w./]+/[\w.]+\.(?:py|h|cpp|cu|md))`", (ROOT / page).read_text())
        )
        tops = (ROOT, ROOT / "ncsn_fast", ROOT / "ncsn_fast" / "engines")
        missing = {p for p in paths if not any((top / p).exists() for top in tops)}
        assert not {p for p in missing if "NAME" not in p}, page
