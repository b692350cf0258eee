"""Plan of a GPU session: its steps, their commands and how their outcomes are judged."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deadlines import ABSENT, FAILED, OK, Runner, Step, last_line

ROOT = Path(__file__).resolve().parent.parent
# Seconds that each benchmark section may take, in running order.
SECTIONS = {
    "ceilings": 40, "step-b256": 110, "step-b1": 80, "norms": 80, "group-norms": 30, "updates": 30,
    "unet-b16": 60, "convolutions": 30, "step-b16": 60, "compiled-b256": 150, "compiled-b1": 120,
    "runtimes-b256": 120, "runtimes-b1": 90,
}  # fmt: skip
FOR_BENCHMARKS = 230.0  # seconds reserved for the benchmarks
CASES, RACE_CASES = 200, 20  # fuzzer cases
SANITIZER = "compute-sanitizer"
ENDING = 8.0  # a process starts no new work in the last seconds before its deadline
USE_THE_GPU = "import torch; torch.ones(9, device='cuda').mul_(2); torch.cuda.synchronize()"
LINK, IN_PLACE = ROOT / "ncsn_fast" / "kernels", "build in place"
NO_COMPILER = 20.0  # seconds; a build that fails sooner never reached the compiler
IMPORTS = "from ncsn_fast import ops; import ncsn_fast.kernels.rows"
BUILT = f"{IMPORTS}; print(ops.available()['cuda_architectures'])"


class Session:
    """Plan for one device.

    Args:
        gpu: result of PROBE.   rehearse: run on the CPU, with small sizes.
    """

    def __init__(self, runner: Runner, gpu: dict[str, Any], records: Path, rehearse: bool) -> None:
        self.runner, self.gpu, self.records, self.rehearse = runner, gpu, records, rehearse
        self.device = "cpu" if rehearse else "cuda"
        self.linked = False
        self.cores = len(os.sched_getaffinity(0))
        self.sanitizer = "a rehearsal has no GPU" if rehearse else ""  # reason against its use

    def run(self, parts: Sequence[str]) -> None:
        reserve = FOR_BENCHMARKS if "bench" in parts else 0.0
        first = [Step("build", self.build, 170, build_outcome)]
        if "test" in parts:
            first.append(Step(SANITIZER, self.try_sanitizer, 60, tool_outcome))
        self.runner.stage(first, workers=2, reserve=reserve)
        self.learn()
        self.mend()
        workers = 2 if self.rehearse else max(4, self.cores)
        if "test" in parts:
            self.runner.stage([*self.tests(), *self.fuzz()], workers=workers, reserve=reserve)
        if "bench" in parts:
            self.runner.stage(self.benchmarks(), workers=2 if self.rehearse else 1)

    # Build -----------------------------------------------------------------------------------

    def build(self, _: float) -> Sequence[str] | str:
        if self.rehearse:
            return "a rehearsal takes the extension that is there"
        built = ROOT / "ncsn_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        if built.exists() and built.stat().st_mtime > newest_source():
            command = [sys.executable, "-c", BUILT]
            done = subprocess.run(
                command, cwd=ROOT, env=self.runner.environment, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            if f"sm_{self.gpu['architecture']}" in done.stdout.split():
                return f"{built.name} is newer than its sources, and for this GPU"
        return self.install()

    def install(self) -> Sequence[str]:
        """Installs editable for the present GPU only; offline if the build tools are installed."""
        options = os.environ.get("CMAKE_ARGS", "")
        options += f" -DCMAKE_CUDA_ARCHITECTURES={self.gpu['architecture']}-real"
        settings = ["NCSN_FAST_CUDA=1", f"CMAKE_ARGS={options.strip()}"]
        here = all(importlib.util.find_spec(name) for name in ("pybind11", "setuptools"))
        path = self.runner.environment["PATH"]
        here = here and all(shutil.which(name, path=path) for name in ("cmake", "ninja"))
        return [
            "env", *settings, "PIP_DISABLE_PIP_VERSION_CHECK=1", sys.executable, "-m", "pip",
            "install", "-q", "--no-deps", *(["--no-build-isolation"] if here else []), "-e", ".",
        ]  # fmt: skip

    def mend(self) -> None:
        """Builds by CMake alone if pip cannot install; without CUDA if nothing else works."""
        build = next(o for o in self.runner.outcomes if o.name == "build")
        if build.status == FAILED and build.seconds < NO_COMPILER:
            self.runner.stage([Step(IN_PLACE, lambda _: self.cmake(cuda=True), 170)], workers=1)
            if self.runner.outcomes[-1].status == OK:
                reason = f"pip: {build.reason}; {IN_PLACE} instead"
                at = self.runner.outcomes.index(build)
                self.runner.outcomes[at] = dataclasses.replace(build, status=ABSENT, reason=reason)
        imports = Step("import", lambda _: [sys.executable, "-c", IMPORTS], 60)
        self.runner.stage([imports], workers=1)
        if self.runner.outcomes[-1].status == FAILED:
            again = Step("build without CUDA", lambda _: self.cmake(cuda=False), 170)
            self.runner.stage([again], workers=1)

    def cmake(self, *, cuda: bool) -> Sequence[str]:
        """Runs CMake into the package folder and links kernels/ as an install would map it."""
        import pybind11

        if not LINK.exists():
            LINK.symlink_to("../kernels")
            self.linked = True
        build, options = ROOT / "build" / "gpu", shlex.split(os.environ.get("CMAKE_ARGS", ""))
        if cuda:
            options.append(f"-DCMAKE_CUDA_ARCHITECTURES={self.gpu['architecture']}-real")
        configure = [
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={LINK.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DNCSN_FAST_CUDA={'ON' if cuda else 'OFF'}", *options,
        ]  # fmt: skip
        compile_it = ["cmake", "--build", str(build), "--parallel", str(self.cores)]
        return ["sh", "-c", f"{shlex.join(configure)} && {shlex.join(compile_it)}"]

    def close(self) -> None:
        """Undoes its changes to the checkout."""
        if self.linked:
            LINK.unlink()

    # Tests -----------------------------------------------------------------------------------

    def try_sanitizer(self, _: float) -> Sequence[str] | str:
        if self.sanitizer:
            return self.sanitizer
        tool = shutil.which("compute-sanitizer", path=self.runner.environment["PATH"])
        return sanitized(tool, "memcheck", "-c", USE_THE_GPU) if tool else "it is not installed"

    def learn(self) -> None:
        """Records whether compute-sanitizer works here."""
        for outcome in self.runner.outcomes:
            if outcome.name == SANITIZER and outcome.status != OK:
                self.sanitizer = f"{SANITIZER}: {outcome.status}, {outcome.reason}"

    def tests(self) -> list[Step]:
        """Returns one step per file of GPU tests, so that none can break the device for others."""
        spread = ["-n", "4"] if importlib.util.find_spec("xdist") and not self.rehearse else []
        options = ["-q", "-ra", "-p", "no:cacheprovider", *spread]
        return [
            Step(path.relative_to(ROOT).as_posix(), run_python("-m", "pytest", *options, str(path)),
                 400, pytest_outcome)
            for path in sorted((ROOT / "tests").rglob("test_*_gpu.py"))
        ]  # fmt: skip

    def fuzz(self) -> list[Step]:
        shards = 1 if self.rehearse else min(4, max(1, self.cores // 2))
        cases = 14 if self.rehearse else -(-CASES // shards)
        plain = " (plain)" if self.sanitizer else ""
        steps = [
            Step(f"fuzz {i + 1} of {shards}, memcheck{plain}",
                 self.fuzzer("memcheck", cases, i * cases), 150, fuzz_outcome)
            for i in range(shards)
        ]  # fmt: skip
        race: Callable[[float], Sequence[str] | str] = lambda _: self.sanitizer  # noqa: E731
        if not self.sanitizer:
            race = self.fuzzer("racecheck", RACE_CASES, CASES * 10)
        return [*steps, Step("fuzz, racecheck", race, 150, fuzz_outcome)]

    def fuzzer(self, tool: str, cases: int, seed: int) -> Callable[[float], Sequence[str]]:
        def command(seconds: float) -> Sequence[str]:
            script = [
                str(ROOT / "tests" / "support" / "gpu_fuzz.py"),
                "--cases", str(cases), "--seed", str(seed),
                "--device", self.device, "--seconds", f"{seconds - 2 * ENDING:.0f}",
                *(["--tiny"] if self.rehearse else []),
            ]  # fmt: skip
            if self.sanitizer:
                return [sys.executable, *script]
            binary = shutil.which("compute-sanitizer", path=self.runner.environment["PATH"]) or ""
            return sanitized(binary, tool, *script)

        return command

    # Benchmarks ------------------------------------------------------------------------------

    def benchmarks(self) -> list[Step]:
        return [Step(f"benchmark {name}", self.section(name), seconds)
                for name, seconds in SECTIONS.items()]  # fmt: skip

    def section(self, name: str) -> Callable[[float], Sequence[str]]:
        return lambda seconds: [
            sys.executable, str(ROOT / "benchmarks" / "measure_gpu.py"), name,
            "--device", self.device, "--out", str(self.records / f"{name}.json"),
            "--seconds", f"{max(seconds - ENDING, 0.6 * seconds):.0f}",
            *(["--small"] if self.rehearse else []),
        ]  # fmt: skip


# How steps are started and judged ----------------------------------------------------------------


def run_python(*arguments: str) -> Callable[[float], Sequence[str]]:
    return lambda _: [sys.executable, *arguments]


def sanitized(tool: str, check: str, *arguments: str) -> list[str]:
    """Returns a Python command under compute-sanitizer, with one allocation per tensor.

    Only then does an access out of bounds leave the allocation.
    """
    # PyTorch probes the driver for optional features: such failing calls are no errors.
    options = ["--report-api-errors", "no"] if check == "memcheck" else []
    return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", check, "--error-exitcode",
            "9", "--target-processes", "application-only", *options, sys.executable,
            *arguments]  # fmt: skip


def newest_source() -> float:
    """Returns the time of the last change to the extension's sources."""
    files = [ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "cmake").rglob("*"),
             *(ROOT / "csrc").rglob("*")]  # fmt: skip
    return max(path.stat().st_mtime for path in files)


def search_path(gpu: dict[str, Any]) -> str:
    """Returns PATH with this Python's tools first and CUDA's last."""
    cuda = [str(Path(gpu["cuda_home"]) / "bin")] if gpu.get("cuda_home") else []
    here = str(Path(sys.executable).parent)
    return os.pathsep.join([here, os.environ.get("PATH", os.defpath), *cuda])


def tool_outcome(code: int, output: str) -> tuple[str, str]:
    """Judges whether a tool works here; a tool that does not is absent, not failed."""
    errors = re.findall(r"^=+ (?:Error|ERROR).*$", output, re.MULTILINE)
    return (OK, "") if code == 0 else (ABSENT, errors[0] if errors else last_line(output))


def build_outcome(code: int, output: str) -> tuple[str, str]:
    if code == 0:
        return OK, ""
    lines = [line.strip() for line in output.splitlines() if "error" in line.lower()]
    errors = [line for line in lines if "subprocess-exited-with-error" not in line]
    return FAILED, (errors[0][:300] if errors else last_line(output))


def pytest_outcome(code: int, output: str) -> tuple[str, str]:
    """Judges a pytest run; a file in which every test was skipped counts as not run."""
    summary = last_line(output).strip("= ")
    if code == 0 and " passed" in f" {summary}":
        return OK, summary
    if code in (0, 5):
        skipped = re.findall(r"^SKIPPED .*?: (.*)$", output, re.MULTILINE)
        return ABSENT, skipped[0] if skipped else summary
    failed = re.findall(r"^(?:FAILED|ERROR) .*$", output, re.MULTILINE)
    return FAILED, (failed[0][:300] if failed else summary)


def fuzz_outcome(code: int, output: str) -> tuple[str, str]:
    if code == 3:
        return ABSENT, next(iter(re.findall(r"^absent: .*$", output, re.MULTILINE)), "nothing ran")
    done = re.findall(r"\d+ of \d+ cases passed \(\d+ asked for\)", output)
    if code == 0 and done:
        return OK, done[-1]
    wrong = re.findall(r"^FAILED .*$|ERROR SUMMARY: .*$", output, re.MULTILINE)
    return FAILED, (wrong[0][:300] if wrong else last_line(output))
