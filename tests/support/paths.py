"""Folders of the repository, and its scripts as modules, for tests at any depth."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"


def load_script(path: Path) -> Any:
    """Imports a script of tools/ or benchmarks/, which are no packages, by its file."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # scripts of a folder import one another
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module
