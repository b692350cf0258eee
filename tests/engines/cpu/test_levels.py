"""The CPU engine and its kernels on processors with fewer instructions than this one has.

Each level is a process of its own, because oneDNN, torch and the extension read their limits once:
ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and NCSN_FAST_ISA. What this machine has is tested by the
same files without a limit.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from ncsn_fast import ops

# oneDNN's level, torch's and ours, and whether oneDNN then has bfloat16 convolutions.
LEVELS = {
    "sse41": ("SSE41", "default", "scalar", False),
    "avx": ("AVX", "default", "scalar", False),
    "avx2": ("AVX2", "avx2", "avx2", False),
    "avx2-vnni": ("AVX2_VNNI", "avx2", "avx2_vnni", False),
    "avx512": ("AVX512_CORE", "avx512", "avx512", True),
    "avx512-vnni": ("AVX512_CORE_VNNI", "avx512", "avx512_vnni", True),
    "avx512-bf16": ("AVX512_CORE_BF16", "avx512", "avx512_vnni", True),
    "amx-emulated": ("AVX512_CORE_BF16", "avx512", "amx_emulated", True),
    "amx": ("AVX512_CORE_AMX", "avx512", "amx", True),
}
SUITE = ("sse41", "avx2", "avx512")  # at which more than a call is tested
# Tests of what the levels decide, new files included. Those of lowering run at one level, where
# oneDNN has no bfloat16; the rest of what they test is the same at all.
FOLDERS: dict[str, tuple[str, ...]] = {level: ("engines/cpu", "ops") for level in SUITE}
FOLDERS["avx2"] += ("engines/lowering",)
FILES = (
    "engines/test_engines.py",
    "engines/test_own_networks.py",
    "engines/test_fallback.py",
    "test_sampler.py",
)
ELSEWHERE = {
    "engines/cpu/test_levels.py": "starts these",
    "engines/lowering/test_fusion.py": "graphs, and the GPU's kernels by PyTorch",
    "engines/lowering/test_passes.py": "graphs",
    "engines/lowering/test_stored.py": "files of graphs",
    "ops/test_addresses.py": "checks of arguments",
    "ops/test_native.py": "the GPU's kernels, emulated",
    "ops/test_native_gpu.py": "needs a GPU",
    "ops/test_native_group_norm.py": "the GPU's kernels, emulated",
    "ops/test_native_norm.py": "the GPU's kernels, emulated",
    "ops/test_native_update.py": "the GPU's kernels, emulated",
    "ops/test_ops_gpu.py": "needs a GPU",
}
CALL = """
import torch
import ncsn_fast
from ncsn_fast import doctor
from ncsn_fast.engines.cpu import onednn
sampler = ncsn_fast.Sampler("digits", device="cpu")
assert sampler.sample(2, method="cas", progress=False).isfinite().all()
assert doctor.main([]) == 0
print("bf16:", onednn.lacks(torch.bfloat16) is None, sampler.report.engine)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels of x86-64"),
]


def files_at(level: str) -> list[str]:
    """Files of the suite that run at a level."""
    found = [str(p.relative_to(ROOT / "tests")) for f in FOLDERS[level] for p in _tests_of(f)]
    return [*sorted({*found} - {*ELSEWHERE}), *FILES]


def _tests_of(folder: str) -> list[Path]:
    return sorted((ROOT / "tests" / folder).glob("test_*.py"))


@pytest.fixture
def limited(request, tmp_path):
    """Runs a Python program at a level: (arguments) -> its output."""
    onednn, torch, ours, _ = LEVELS[request.param]
    needed = "avx512_vnni" if ours == "amx_emulated" else ours
    if needed not in ops.available()["isa_usable"]:
        pytest.skip(f"this processor has no {ours}")
    limits = {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": torch, "NCSN_FAST_ISA": ours}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, **limits, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
    }  # fmt: skip

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        return done.stdout

    run.level = request.param
    return run


@pytest.mark.parametrize("limited", LEVELS, indirect=True)
def test_the_default_call_and_doctor_run(limited):
    said = limited("-c", CALL)
    assert said.endswith(f"bf16: {LEVELS[limited.level][3]} cpu\n")


@pytest.mark.parametrize("limited", ["avx2"], indirect=True)
def test_benchmarks_leave_out_what_the_processor_lacks(limited):
    benches = [f"benchmarks/{name}.py" for name in ("bench_winograd", "bench_sampling")]
    said = limited("-m", "pytest", "-q", "-rs", "--benchmark-disable", "-k", "not equal", *benches)
    assert "oneDNN has no bfloat16 convolutions for this processor" in said
    assert " passed" in said


@pytest.mark.parametrize("limited", SUITE, indirect=True)
def test_the_suite_passes(limited):
    said = limited(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow",
        *(f"tests/{name}" for name in files_at(limited.level)),
    )  # fmt: skip
    assert " passed" in said


def test_what_runs_elsewhere_is_there():
    """A file that was renamed is not left out by its old name."""
    assert all((ROOT / "tests" / name).is_file() for name in (*ELSEWHERE, *FILES))
    assert {"engines/cpu/test_converted_maps.py", "ops/test_winograd.py"} <= {*files_at("sse41")}
    assert "engines/lowering/test_products.py" in files_at("avx2")
