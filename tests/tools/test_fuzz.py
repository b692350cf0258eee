"""tools/fuzz.py: figures that add up, processes that die or hang, and runs that go on."""

import json

import pytest
from paths import ROOT, load_script

KIND = """
import os, signal, time

def mutate(seed):
    return str(seed).encode()

def check(content):
    seed = int(content)
    if seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 5:
        time.sleep(600)
    if seed == 7:
        raise AssertionError("seven")
    if seed == 9:
        bytearray(5 * 2**30)
    return {"all": True, "even": seed % 2 == 0}
"""


@pytest.fixture(scope="module")
def fuzz():
    return load_script(ROOT / "tools" / "fuzz.py")


def part(**figures):
    usual = {
        "executions": 1, "first_seed": 0, "read": {}, "failures": 0, "first_failures": [],
        "slowest_seconds": 0.0, "slowest_seed": 0, "seconds": 0.5, "peak_mb": 7,
    }  # fmt: skip
    return {**usual, **figures}


def test_figures_add_up(fuzz):
    a = part(read={"x": 1}, failures=1, first_failures=["a"], slowest_seconds=2.0, slowest_seed=4)
    b = part(executions=3, first_seed=9, read={"x": 2, "y": 1}, peak_mb=9, slowest_seconds=1.0)
    assert fuzz.joined(a, b) == part(
        executions=4, read={"x": 3, "y": 1}, failures=1, first_failures=["a"], peak_mb=9,
        slowest_seconds=2.0, slowest_seed=4, seconds=1.0,
    )  # fmt: skip


def test_unknown_kinds_are_refused(fuzz, capsys):
    with pytest.raises(SystemExit):
        fuzz.main(["10", "spells"])
    assert "no kind spells; there are pictures, json_texts" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_that_die_or_hang_are_replaced(fuzz, tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(KIND)
    monkeypatch.syspath_prepend(tmp_path)  # processes inherit it
    monkeypatch.setattr(fuzz, "PATIENCE", 5.0)
    monkeypatch.setattr(fuzz, "KINDS", {"dying": 1.0})
    monkeypatch.setattr(fuzz, "AT_ONCE", 6)
    out = tmp_path / "found.json"
    assert fuzz.main(["8", "--out", str(out)]) == 1
    first = json.loads(out.read_text())["kinds"]["dying"]
    assert first["executions"] == 8
    assert first["first_failures"] == [
        "seed 3: the process ended with -9", "seed 5: no end after 5 s", "seed 7: seven",
    ]  # fmt: skip
    assert first["read"] == {"all": 5, "even": 4}
    assert fuzz.main(["12", "--out", str(out)]) == 1  # goes on
    found = json.loads(out.read_text())["kinds"]["dying"]
    assert (found["executions"], found["failures"]) == (12, 4)
    assert found["first_failures"][3] == "seed 9: MemoryError()"
    assert found["read"] == {"all": 8, "even": 6}
