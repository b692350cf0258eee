"""Helpers for the test cases of the Triton kernels.

Cases are in files triton_*_cases.py, which pytest does not collect by itself. They run in a child
process, because TRITON_INTERPRET is read when triton is first imported and would change every later
use of Triton in the process: test_triton_interpreter.py runs them on the CPU with it set,
test_triton_gpu.py on a GPU without it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from norm_cases import noise_like as noise_like
from norm_cases import worst
from paths import ROOT, TESTS
from torch import Tensor

CASES = TESTS / "kernels"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run_cases(*cases: str, interpreted: bool) -> None:
    """Runs cases in a separate process; fails with its output if one fails.

    Args:
        cases: kinds, as in triton_KIND_cases.py, or single tests of them as "KIND::test_NAME".
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    named = (case.partition("::") for case in cases)
    nodes = [f"{CASES / f'triton_{kind}_cases.py'}{mark}{test}" for kind, mark, test in named]
    child = subprocess.run(
        [*command, *nodes],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = f"{child.stdout[-20000:]}\n{child.stderr[-5000:]}"
    assert child.returncode == 0, output
    assert re.search(r"\d+ passed", child.stdout), output


def nhwc(x: Tensor) -> Tensor:
    """Returns a channels-last copy on the device under test."""
    return x.to(DEVICE).contiguous(memory_format=torch.channels_last)


def assert_close(ours: Tensor, eager: Tensor, exact: Tensor, floor: float = 0.0) -> None:
    """Raises unless the error is at most twice eager's, plus two roundings, plus `floor`.

    The roundings are of the largest output. They cover the interpreter's truncation to bfloat16,
    where a GPU rounds.
    """
    assert ours.shape == exact.shape
    assert ours.dtype == eager.dtype
    largest = exact.abs().max().item() if exact.numel() else 0.0
    floor += 2 * torch.finfo(ours.dtype).eps * largest
    assert worst(ours, exact) <= 2 * worst(eager, exact) + floor
