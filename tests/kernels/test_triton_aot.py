"""The Triton kernels compile for sm_90 without a GPU, without spills, with 16-byte accesses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_common
from paths import ROOT

TOOL = ROOT / "tools" / "compile_kernels.py"
REPORT = ROOT / "benchmarks" / "results" / "aot-sm90.json"


def compiled(tmp_path: Path, *arguments: str) -> dict:
    """The tool's report, made in a process of its own: interpreted kernels cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    out = tmp_path / "report.json"
    child = subprocess.run(
        [sys.executable, str(TOOL), "--out", str(out), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout + child.stderr
    return json.loads(out.read_text())


# Kernels that read, and that write, maps; the others write a few numbers per channel.
READ = {
    "statistics_kernel", "apply_kernel", "single_kernel", "reduce_kernel", "grad_x_kernel",
    "group_apply_kernel", "group_single_kernel",
    "update_kernel", "add_elu_kernel", "pool5_kernel", "mean_pool2_kernel", "resize_add_kernel",
}  # fmt: skip
WRITE = (READ | {"fill_kernel"}) - {"statistics_kernel", "reduce_kernel"}


def check(kernels: dict) -> None:
    for name, kernel in kernels.items():
        assert kernel["spill_bytes"] == kernel["stack_bytes"] == kernel["scratch_bytes"] == 0, name
        if name.startswith("odd"):
            continue  # too small for 16 bytes
        if kernel["kernel"] in READ:
            assert kernel["load_bytes"].get("16", 0) > 0, name
        if kernel["kernel"] in WRITE:
            assert kernel["store_bytes"].get("16", 0) > 0, name
        if kernel["kernel"] == "add_elu_kernel":  # biases too
            assert {*kernel["load_bytes"], *kernel["store_bytes"]} == {"16"}, name


@pytest.mark.slow
@triton_common.needs_triton
def test_main_kernels_compile(tmp_path):
    found = compiled(tmp_path, "--only-main")
    check(found["kernels"])
    assert {kernel["kernel"] for kernel in found["kernels"].values()} >= {
        "statistics_kernel", "apply_kernel", "single_kernel", "update_kernel", "fill_kernel",
        "coefficients_kernel", "group_apply_kernel", "group_single_kernel",
    }  # fmt: skip
    committed = json.loads(REPORT.read_text())
    if found["triton"] == committed["triton"]:
        again = {name: committed["kernels"].get(name) for name in found["kernels"]}
        assert again == found["kernels"], "kernels changed: run tools/compile_kernels.py"


def test_the_committed_report_has_no_spills():
    report = json.loads(REPORT.read_text())
    assert len(report["kernels"]) > 100
    check(report["kernels"])
