"""Notebooks: what is in the repository, and that they run on a clean checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@named
def test_outputs_are_stripped(path: Path) -> None:
    cells = code_cells(path)
    assert 10 < len(cells) <= 20
    for cell in cells:
        assert (cell["outputs"], cell["execution_count"], cell["metadata"]) == ([], None, {})


@named
def test_last_values_are_asserted(path: Path) -> None:
    last = "".join(code_cells(path)[-1]["source"])
    assert last.count("assert ") >= 4


@named
def test_notebooks_are_linked(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert f": {name}\n" in (ROOT / "mkdocs.yml").read_text()
    assert f"]({name})" in (ROOT / "README.md").read_text()
    pages = (ROOT / "docs" / "tutorials").glob("*.md")
    assert any(f"](../../{name})" in page.read_text() for page in pages)


@pytest.mark.slow
@named
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # raises where a cell does, and so where an assertion at the end does not hold
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    pictures = sum(any("image/png" in o.get("data", {}) for o in found) for found in outputs)
    assert pictures > len(outputs) / 2
