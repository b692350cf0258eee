"""Builds the extension with AddressSanitizer and UBSan, and runs its tests on that build.

`make test-asan` runs this: CPU only, with GCC, in build/sanitize, where the next call builds only
what changed. The package's own extension stays as it is: a pytest plugin in tests/support loads the
other one. The first error that a sanitizer finds ends its process, with a report.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
SANITIZERS = "address,undefined"
# Each group is a process of its own.
TESTS = (("tests/ops",), ("tests/engines/cpu", "tests/engines/test_chains.py"))
# Leaks are Python's and torch's own, which live as long as the process.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
# Processes that tests start load the package's own extension; of these tests that is all there is.
ELSEWHERE = (
    "tests/engines/cpu/test_levels.py",
    "tests/engines/cpu/test_cpu_engine.py::test_memory_stays_flat_over_a_thousand_samples",
)


def compiler() -> str:
    """Returns the path of GCC; raises SystemExit without one, because the runtimes differ."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    version = "" if found is None else _output(found, "--version")
    if found is None or "Free Software Foundation" not in version:
        raise SystemExit("the sanitizers need GCC: install g++, or name it in the variable CXX")
    return found


def build(folder: Path) -> Path:
    """Builds the extension with sanitizers below a folder and returns its path."""
    import pybind11

    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": compiler(),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder / "extension",
        "NCSN_FAST_CUDA": "OFF",
        "NCSN_FAST_SANITIZE": SANITIZERS,
        "NCSN_FAST_VERSION": _version(),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        _run("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options)
        _run("cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1))
    (extension,) = (folder / "extension").glob("_C*.so")
    return extension


def environment(extension: Path) -> dict[str, str]:
    """Returns the environment of a pytest that loads this extension.

    A process that loads it needs the sanitizers' runtimes from its start, and the C++ library with
    them: the runtime wraps the function that throws.
    """
    runtimes = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    preloaded = [_output(compiler(), f"-print-file-name={name}").strip() for name in runtimes]
    missing = [name for name in preloaded if not Path(name).is_absolute()]
    if missing:
        raise SystemExit(f"GCC has no {' and '.join(missing)}: install its sanitizers' libraries")
    path = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": " ".join(preloaded),
        "NCSN_FAST_EXTENSION": str(extension),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }


def run_tests(extension: Path, tests: Sequence[Sequence[str]] = TESTS) -> tuple[int, str]:
    """Runs pytest on groups of tests, side by side; returns the worst exit code and all output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "sanitized_extension"]
    command += ["-p", "no:cacheprovider", *(f"--deselect={test}" for test in ELSEWHERE)]
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in tests]
        running = [
            subprocess.Popen(
                [*command, *group],
                cwd=ROOT,
                env=environment(extension),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for group, output in zip(tests, outputs, strict=True)
        ]
        codes, text = [process.wait() for process in running], ""
        for group, code, output in zip(tests, codes, outputs, strict=True):
            output.seek(0)
            text += f"{output.read()}pytest {' '.join(group)} ended with code {code}\n"
        return max(map(abs, codes)), text


def main() -> None:
    """Builds, runs and prints; raises SystemExit with the exit code."""
    code, text = run_tests(build(BUILD))
    print(text)
    raise SystemExit(code)


def _version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _run(*command: str) -> None:
    # What pip installed beside this Python comes first.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
