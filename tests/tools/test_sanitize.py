"""The extension's tests on a build with AddressSanitizer and UBSan: what `make test-asan` runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT, load_script

sanitize = load_script(ROOT / "tools" / "sanitize.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers are those of GCC"),
]


@pytest.fixture(scope="module")
def extension() -> Path:
    return sanitize.build(sanitize.BUILD)


def test_the_extension_passes_its_tests_under_the_sanitizers(extension: Path) -> None:
    code, output = sanitize.run_tests(extension)
    assert code == 0, output[-20_000:]
    passed = [int(count) for count in re.findall(r"(\d+) passed", output)]
    assert len(passed) == len(sanitize.TESTS)
    assert min(passed) > 100


# The extension believes what it is told of memory, so a lie is a read beyond the end of a tensor.
LIE = """
import sanitized_extension
import torch
from ncsn_fast import _C
out, samples = torch.zeros(1000), torch.arange(4)
_C.uniform((out.data_ptr(), 4 * SIZE), (samples.data_ptr(), 32), 4, SIZE // 4, 0, 0, 0)
print("the lie was believed")
"""


@pytest.mark.parametrize(("size", "caught"), [(1000, False), (1004, True)])
def test_a_tensors_memory_ends_where_the_sanitizer_thinks(
    extension: Path, size: int, caught: bool
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIE.replace("SIZE", str(size))],
        env=sanitize.environment(extension), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ("heap-buffer-overflow" in done.stderr) == caught
    assert ("the lie was believed" in done.stdout) == (not caught)
    assert (done.returncode != 0) == caught
