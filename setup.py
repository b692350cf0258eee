"""Builds the extension `ncsn_fast._C` with CMake; everything else is in pyproject.toml.

Environment: NCSN_FAST_CUDA=1 demands the CUDA backend, 0 forbids it; unset takes it where nvcc is.
CMAKE_ARGS are passed on; CMAKE_BUILD_PARALLEL_LEVEL limits the compile jobs.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_CHOICES = {"": "AUTO", "1": "ON", "0": "OFF"}


class CMakeExtension(Extension):
    """An extension whose sources CMakeLists.txt knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Builds in setuptools' build_temp and leaves the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # Fresh: a cache left by another build environment names tools that are gone by now.
        _run("cmake", "--fresh", "-S", str(ROOT), "-B", str(build), *self._options(target))
        _run("cmake", "--build", str(build), "--parallel", _jobs())

    def _options(self, target: Path) -> list[str]:
        choice = os.environ.get("NCSN_FAST_CUDA", "")
        if choice not in CUDA_CHOICES:
            raise SystemExit(f"NCSN_FAST_CUDA must be 1, 0 or unset; got {choice!r}")
        options = [
            "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DNCSN_FAST_CUDA={CUDA_CHOICES[choice]}",
            f"-DNCSN_FAST_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        return options + shlex.split(os.environ.get("CMAKE_ARGS", ""))


def _run(*command: str) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"{' '.join(command[:2])} failed; its message is above")


def _jobs() -> str:
    return os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)


setup(
    packages=[*find_packages(include=["ncsn_fast", "ncsn_fast.*"]), "ncsn_fast.kernels"],
    package_dir={"ncsn_fast.kernels": "kernels"},
    ext_modules=[CMakeExtension("ncsn_fast._C")],
    cmdclass={"build_ext": CMakeBuild},
)
