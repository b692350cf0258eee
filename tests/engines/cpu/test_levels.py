"""The CPU engine and its kernels on processors with fewer instructions than this one has.

Each level is a process of its own, because oneDNN, torch and the extension read their limits once:
ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and NCSN_FAST_ISA. What this machine has is tested by the
same files without a limit.
"""

import os
import platform
import subprocess
import sys

import pytest
from paths import ROOT

from ncsn_fast import ops

# oneDNN's level, torch's and ours, and whether oneDNN then has bfloat16 convolutions.
LEVELS = {
    "sse41": ("SSE41", "default", "scalar", False),
    "avx": ("AVX", "default", "scalar", False),
    "avx2": ("AVX2", "avx2", "avx2", False),
    "avx2-vnni": ("AVX2_VNNI", "avx2", "avx2", False),
    "avx512": ("AVX512_CORE", "avx512", "avx512", True),
    "avx512-vnni": ("AVX512_CORE_VNNI", "avx512", "avx512_vnni", True),
    "avx512-bf16": ("AVX512_CORE_BF16", "avx512", "avx512_vnni", True),
    "amx-emulated": ("AVX512_CORE_BF16", "avx512", "amx_emulated", True),
    "amx": ("AVX512_CORE_AMX", "avx512", "amx", True),
}
SUITE = ("sse41", "avx2", "avx512")  # at which more than a call is tested
FILES = (
    "engines/cpu/test_autotune.py",
    "engines/cpu/test_cpu_engine.py",
    "engines/test_engines.py",
    "engines/test_own_networks.py",
    "engines/test_fallback.py",
    "ops/test_cpu.py",
    "ops/test_winograd.py",
    "ops/test_instance_norm_plus.py",
    "ops/test_sampler_update.py",
    "ops/test_noise.py",
    "test_sampler.py",
)
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
    files = [f"benchmarks/{name}.py" for name in ("bench_winograd", "bench_sampling")]
    said = limited("-m", "pytest", "-q", "-rs", "--benchmark-disable", "-k", "not equal", *files)
    assert "oneDNN has no bfloat16 convolutions for this processor" in said
    assert " passed" in said


@pytest.mark.parametrize("limited", SUITE, indirect=True)
def test_the_suite_passes(limited):
    files = [f"tests/{name}" for name in FILES]
    said = limited(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", *files
    )
    assert " passed" in said
