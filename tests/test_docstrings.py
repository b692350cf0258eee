"""Form of the docstrings of ncsn_fast and kernels: a plain first line that stands on its own."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

LONGEST = 100
QUESTION = re.compile(r"(What|How|Which|Where|Who|Why)\b")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Documented(NamedTuple):
    """Module, class or function with its docstring; public if neither it nor a scope has a _."""

    place: str
    public: bool
    is_method: bool
    docstring: str | None

    @property
    def first_line(self) -> str:
        return (self.docstring or "").split("\n")[0]


def documented(path: Path) -> list[Documented]:
    """Returns the module, its classes and its functions, without those inside functions."""
    module = ast.parse(path.read_text())
    found = [Documented(f"{path.relative_to(ROOT)}:1", True, False, ast.get_docstring(module))]

    def visit(scope: ast.Module | ast.ClassDef, public: bool) -> None:
        for node in scope.body:
            if isinstance(node, Definition):
                place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                shown = public and not node.name.startswith("_")
                method = isinstance(scope, ast.ClassDef) and not isinstance(node, ast.ClassDef)
                found.append(Documented(place, shown, method, ast.get_docstring(node)))
                if isinstance(node, ast.ClassDef):
                    visit(node, shown)

    visit(module, True)
    return found


FOLDERS = (ROOT / "ncsn_fast", ROOT / "kernels")
SOURCES = sorted({path.resolve() for folder in FOLDERS for path in folder.rglob("*.py")})
ALL = [item for path in SOURCES for item in documented(path)]
WITH_DOCSTRING = [item for item in ALL if item.docstring]


def test_all_sources_are_read():
    assert {"ncsn_fast/__init__.py:1", "kernels/__init__.py:1"} <= {item.place for item in ALL}
    assert len(WITH_DOCSTRING) > 500


def test_modules_public_classes_and_public_functions_have_docstrings():
    # Methods may inherit theirs, as those of protocols and nn.Module do.
    public = [item for item in ALL if item.public and not item.is_method]
    assert [item.place for item in public if not item.docstring] == []


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("names its subject instead of asking", lambda item: not QUESTION.match(item.first_line)),
        ("is short", lambda item: len(item.first_line) <= LONGEST),
        ("ends with a full stop", lambda item: item.first_line.endswith(".")),
    ],
)
def test_first_line(rule, holds):
    broken = [f"{item.place}: {item.first_line}" for item in WITH_DOCSTRING if not holds(item)]
    assert not broken, f"a docstring's first line {rule}:\n" + "\n".join(broken)


def test_first_line_stands_alone():
    broken = [i.place for i in WITH_DOCSTRING if "".join(i.docstring.split("\n")[1:2]).strip()]
    assert not broken, "a blank line follows a docstring's first line:\n" + "\n".join(broken)
