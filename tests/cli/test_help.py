"""--help and usage errors: said before torch is imported, which takes more than a second."""

import json
import subprocess
import sys

import pytest

from ncsn_fast.__main__ import COMMANDS
from ncsn_fast.cli.edit_options import Command as EDITS

OTHERS = {
    "train": ["train --config toy --help", "train --config nothing", "train --config celeba"],
    "sample": ["sample --bogus", "sample --n 0", "sample --shard 4/4", "sample --snr 1"],
    "edit": [
        f"edit {edit.__metadata__[0].name} --help"  # of subcommand(name)
        for edit in EDITS.__args__
    ],
    "cache": ["cache list --help", "cache clear --help", "cache clear --older-than -1"],
    "tune": ["tune --nfe 1", "tune --loss kid", "tune --budget x"],
    "export": ["export --out a.onnx --format trt --opset 20", "export --out a.onnx --refit"],
}
# Runs each line as `python -m ncsn_fast.NAME` and as `python -m ncsn_fast NAME`, and prints what
# it ended with and whether torch was there.
PROGRAM = """
import contextlib, io, json, runpy, sys
found = []
for line in json.loads(sys.argv[1]):
    name, *words = line.split()
    for module, arguments in ((f"ncsn_fast.{name}", words), ("ncsn_fast", [name, *words])):
        sys.argv[1:] = arguments
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            found.append((line, stop.code, said.getvalue(), "torch" in sys.modules))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ends():
    """Line -> (exit code, what was said), of one process, in which torch never was imported."""
    lines = [f"{name} --help" for name in COMMANDS]
    lines += [line for some in OTHERS.values() for line in some]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines)], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert [line for line, *_ in found] == [line for line in lines for _ in range(2)]
    assert not [line for line, _, _, imported in found if imported]
    return {line: (code, said) for line, code, said, _ in found}


def test_help_is_said_without_torch(ends):
    helped = {line: end for line, end in ends.items() if line.endswith("--help")}
    assert {line.split()[0] for line in helped} == set(COMMANDS)
    for line, (code, said) in helped.items():
        assert code == 0, line
        assert "--help" in said, line


def test_usage_errors_are_said_without_torch(ends):
    refused = {line: end for line, end in ends.items() if not line.endswith("--help")}
    assert len(refused) > 8
    for line, (code, said) in refused.items():
        assert code == 2, (line, said)
        assert said.startswith("error: "), line
        assert said.count("\n") == 1, line
