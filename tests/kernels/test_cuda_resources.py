"""Registers, spills and access widths of the CUDA kernels, as committed and as compiled here."""

import json
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

TOOL = ROOT / "tools" / "cuda_resources.py"
REPORT = ROOT / "benchmarks" / "results" / "cuda-resources.json"


def check(kernels: list[dict]) -> None:
    for kernel in kernels:
        name = f"{kernel['arch']} {kernel['kernel']}"
        assert kernel["spill_bytes"] == kernel["stack_bytes"] == 0, name
        assert kernel["shared_bytes"] <= 48 * 1024, name
        # at least 512 threads of 65536 registers a multiprocessor
        assert kernel["registers"] <= 128, name
        narrow = kernel["kernel"] in ("UpdateQuads<false>", "GroupCoefficients")
        wide = "Any" not in kernel["kernel"] and not narrow
        assert (kernel["load_bytes"].get("16", 0) > 0) == wide, name
        writes_maps = not kernel["kernel"].startswith("Statistics")
        assert (kernel["store_bytes"].get("16", 0) > 0) == (wide and writes_maps), name
        if wide and kernel["source"] in ("instance_norm_plus", "group_norm"):
            # maps in words of 16 bytes alone; the 4-byte ones are parameters and partials
            assert not {"1", "2", "8"} & {*kernel["load_bytes"], *kernel["store_bytes"]}, name


def test_committed_report():
    kernels = json.loads(REPORT.read_text())["kernels"]
    for arch in ("sm_80", "sm_90"):
        names = [kernel["kernel"] for kernel in kernels if kernel["arch"] == arch]
        assert len(names) == len(set(names)) == 60
    check(kernels)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_kernels_compile_to_the_committed_report(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, str(TOOL), "--arch", "sm_90", "--out", str(out)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    found, committed = (json.loads(path.read_text()) for path in (out, REPORT))
    check(found["kernels"])
    if found["nvcc"] == committed["nvcc"]:
        again = [kernel for kernel in committed["kernels"] if kernel["arch"] == "sm_90"]
        assert found["kernels"] == again, "kernels changed: run tools/cuda_resources.py"
