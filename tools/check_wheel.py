"""Unpacks a wheel and runs its extension: `python tools/check_wheel.py dist/*.whl`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIRED = (
    "ncsn_fast/kernels/__init__.py",
    "ncsn_fast/assets/digits/model.safetensors",
    "ncsn_fast/assets/digit_features/model.safetensors",
)


def check(wheel: Path) -> None:
    """Raises SystemExit unless the wheel is complete and can be imported outside the checkout."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        missing = [name for name in REQUIRED if name not in archive.namelist()]
        if missing:
            raise SystemExit(f"{wheel} lacks {', '.join(missing)}")
        archive.extractall(folder)
        code = "import ncsn_fast._C as c, ncsn_fast as n; print(n.__file__, c.build_info())"
        environment = {"PYTHONPATH": folder, "PATH": ""}
        subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env=environment)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: check_wheel.py WHEEL (exactly one; empty dist/ first)")
    check(Path(sys.argv[1]))
