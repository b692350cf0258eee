"""Installs a wheel and draws samples with it: `python tools/check_wheel.py dist/*.whl`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = (
    "ncsn_fast/kernels/__init__.py",
    *(
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "ncsn_fast" / "assets").rglob("*"))
        if path.is_file()
    ),
)


PROGRAM = """
import ncsn_fast, ncsn_fast._C as extension
print(ncsn_fast.__file__, ncsn_fast.__version__, extension.build_info())
images = ncsn_fast.Sampler("digits", device="cpu").sample(2, method="fast", progress=False)
assert images.shape == (2, 1, 16, 16) and 0.05 < images.mean() < 0.6, images.mean()
"""


def check(wheel: Path) -> None:
    """Raises SystemExit unless the wheel is complete, and draws samples once it is installed.

    It is installed into an empty folder, and run with an empty PATH: no compiler is found. What it
    depends on is this Python's.
    """
    with zipfile.ZipFile(wheel) as archive:
        missing = [name for name in REQUIRED if name not in archive.namelist()]
    if missing:
        raise SystemExit(f"{wheel} lacks {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
        subprocess.run([*install, "--target", folder, str(wheel.resolve())], check=True)
        environment = {"PYTHONPATH": folder, "PATH": "", "XDG_CACHE_HOME": f"{folder}/cache"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        print(done.stdout, end="")
        if done.returncode != 0 or not done.stdout.startswith(folder):
            raise SystemExit(f"{wheel} does not run where it is installed")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: check_wheel.py WHEEL (exactly one; empty dist/ first)")
    check(Path(sys.argv[1]))
