"""Folders of the repository, and import of its scripts, for tests at any depth."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"


def load_script(path: Path) -> Any:
    """Imports a script of tools/ or benchmarks/, which are not packages, from its file."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # scripts import others in their folder
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look up their own module
    spec.loader.exec_module(module)
    return module
