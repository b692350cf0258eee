"""The compiled extension: how it was built, and that it needs nothing it should not."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from paths import ROOT

from ncsn_fast import _C, ops

EXTENSION = Path(_C.__file__)


def tool_output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_build_info():
    info = _C.build_info()
    assert info["version"] == version("ncsn_fast")
    assert info["compiler"]
    assert info["isa_levels"][0] == "scalar"
    assert bool(info["sanitizers"]) == ("sanitized_extension" in sys.modules)
    assert info["cuda_built"] == bool(info["cuda_architectures"]) == bool(info["cuda_version"])


def test_levels():
    usable = _C.isa_levels()
    assert set(usable) <= set(_C.build_info()["isa_levels"])
    assert _C.default_isa() == usable[-1]


@pytest.mark.slow
def test_the_environment_forces_a_level():
    program = "from ncsn_fast import ops; print(ops.available()['isa_default'])"

    def run(level: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "NCSN_FAST_ISA": level}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    for level in ("", *_C.isa_levels()):
        assert run(level).stdout.strip() == (level or _C.default_isa())
    assert "NCSN_FAST_ISA=sse9: the levels of this machine are scalar" in run("sse9").stderr


def test_available_reports_build_and_machine():
    report = ops.available()
    assert report["isa_default"] in report["isa_usable"]
    assert report["cuda_devices"] == _C.cuda_device_count()


def test_without_visible_devices_there_are_none():
    program = "from ncsn_fast import _C; print(_C.cuda_device_count(), _C.cuda_device_count())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    assert answer.stdout.split() == ["0", "0"]


def test_needs_neither_torch_nor_a_driver():
    dynamic = tool_output("readelf", "-d", str(EXTENSION))
    needed = [line for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert needed
    for library in ("torch", "c10", "libcuda", "libcudart", "nvrtc"):
        assert not any(library in line for line in needed)


def test_exports_only_its_entry_point():
    symbols = tool_output("nm", "-D", "--defined-only", str(EXTENSION))
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert "PyInit__C" in names
    assert not [name for name in names if "ncsn_fast" in name]


def test_device_code_is_inside_when_cuda_was_built():
    assert _C.build_info()["cuda_built"] == hasattr(_C, "sampler_update_cuda")
    if not _C.build_info()["cuda_built"]:
        pytest.skip("built without CUDA")
    sections = tool_output("readelf", "-S", "-W", str(EXTENSION))
    assert ".nv_fatbin" in sections


def test_kernels_package_is_installed():
    import ncsn_fast.kernels

    assert ncsn_fast.kernels.__doc__


@pytest.mark.slow
def test_kernels_compile_for_aarch64():
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("aarch64-linux-gnu-g++ is not installed")
    # The steps of a plan need Python's headers of that machine.
    sources = [p for p in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if p.name != "plan.cpp"]
    assert len(sources) > 15
    flags = ["-std=c++20", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-DNCSN_ISA=scalar"]
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run([compiler, *flags, *folders, "-fsyntax-only", *map(str, sources)], check=True)


def test_instructions_of_one_processor_are_behind_a_condition():
    for path in sorted((ROOT / "csrc").rglob("*")):
        depth = []  # conditions around a line
        for line in path.read_text().splitlines() if path.is_file() else ():
            if match := re.match(r"#\s*(if|ifdef|ifndef|elif|else|endif)\b(.*)", line):
                kind, condition = match[1], match[2]
                if kind in ("elif", "else", "endif"):
                    depth.pop()
                if kind != "endif":
                    depth.append(condition)
            elif re.search(r"\b_mm\d*_|immintrin|__builtin_cpu_supports|__builtin_ia32", line):
                assert any("__AVX" in c or "X86" in c for c in depth), f"{path}: {line.strip()}"


def test_wheels_are_built_for_every_platform_that_is_told():
    wheels = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert wheels["build"] == [f"cp3{minor}-manylinux_*" for minor in (11, 12, 13)]
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    platforms = (ROOT / "docs" / "platforms.md").read_text()
    for machine in ("x86_64", "aarch64"):
        assert f"architecture: {machine}}}" in workflow
        assert f"manylinux-{machine}-image" in wheels
        assert f"Linux {machine.replace('_', '-')}" in platforms
    assert "sample --model digits" in wheels["test-command"]
