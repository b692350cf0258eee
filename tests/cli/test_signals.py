"""Ctrl-C and SIGTERM: one line and an exit code, from the first import to the last write."""

import os
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT

from ncsn_fast.__main__ import COMMANDS
from ncsn_fast.cli import command
from ncsn_fast.data.files import atomic_write


def _hear_interrupts() -> None:
    """Undoes what a shell does to its background jobs: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def slow_torch(tmp_path):
    """Starts commands where importing torch says so and takes a minute."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT)))

    def start(*words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_hear_interrupts,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        return process

    return start


# Arguments without which a command refuses its line, before it imports torch.
NEEDED = {"edit": ["denoise"], "export": ["--out", "m.onnx"], "convert": ["a", "b"],
          "cache": ["list"]}  # fmt: skip


@pytest.mark.parametrize("name", [*COMMANDS, ""])
def test_interrupted_during_imports(name, slow_torch):
    words = [f"ncsn_fast.{name}", *NEEDED.get(name, ())] if name else ["ncsn_fast", "sample"]
    process = slow_torch(*words)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"interrupted\n"
    assert process.returncode == 130


def test_terminated_during_imports(slow_torch):
    process = slow_torch("ncsn_fast.sample")
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1] == b"terminated\n"
    assert process.returncode == 143


def test_terminated_while_writing_leaves_nothing(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def main() -> int:
        with atomic_write(tmp_path / "result.bin") as path:
            path.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return 0

    assert command.run(main) == 143
    assert capsys.readouterr().err == "terminated\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_of_the_caller_stay():
    def handler(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, handler)
    try:
        assert command.run(lambda: 0 if signal.getsignal(signal.SIGTERM) is handler else 9) == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name, words in {
        "train": ["--dry-run"], "edit": ["denoise"], "evaluate": [],
        "export": ["--out", "m.onnx"], "convert": ["a", "b"],
    }.items():  # fmt: skip
        assert command.run_module(name, words) == 2
        said = capsys.readouterr().err
        what = "train, of the toy or with --dry-run," if name == "train" else name
        assert said.startswith(
            f"error: ncsn_fast.{what} runs in one process, and WORLD_SIZE=4 says"
        )
        assert said.endswith("start it without torchrun\n")
