"""`ncsn-fast cache`: what is kept, as a table, and how it goes."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ncsn_fast import __main__ as dispatcher
from ncsn_fast import cache
from ncsn_fast.cli import command
from ncsn_fast.engines.tensorrt.plan_cache import PlanCache

FACTS: dict[str, Any] = {
    "model": "0123456789abcdef" * 4,
    "dtype": "bf16",
    "shapes": {"opt": [4, 3, 8, 8], "max": [16, 3, 8, 8]},
    "gpu": {"name": "NVIDIA H100", "multiprocessors": 132},
    "tensorrt": "10.16.1",
}
DAY = 86400


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("NCSN_FAST_CACHE_LIMIT", "5GB")


@pytest.fixture
def kept() -> PlanCache:
    """A plan used 1 day ago, one of few facts used 3 days ago, a timing cache used 2 days ago."""
    kept = PlanCache()
    kept.fetch(FACTS, lambda: (bytes(2_000_000), {}))
    kept.put("timing", FACTS, bytes(3_000))
    kept.fetch({"sides": []}, lambda: (bytes(50_000), {}))
    ago = {"blob": 2, "plan": 1}
    for path in kept.folder.iterdir():
        days = 3 if 10_000 < path.stat().st_size < 100_000 else ago.get(path.suffix[1:], 0)
        when = time.mktime((2026, 3, 10 - days, 12, 30, 0, 0, 0, -1))
        os.utime(path, (when, when))
    return kept


def run(*words: str) -> int:
    return command.run(lambda: cache.main(list(words)))


def test_list(kept, capsys):
    assert run("list") == 0
    headings, plan, blob, bare, total = capsys.readouterr().out.splitlines()
    cells = [re.split(r"\s{2,}", line) for line in (headings, plan, blob, bare)]
    facts = ["0123456789ab", "bf16", "max 16x3x8x8, opt 4x3x8x8", "NVIDIA H100", "10.16.1"]
    assert cells == [
        ["size", "last use", "what", "model", "dtype", "shapes", "GPU", "TensorRT"],
        ["2.0 MB", "2026-03-09 12:30", "plan", *facts],
        ["3.3 kB", "2026-03-08 12:30", "timing", *facts],
        ["50.1 kB", "2026-03-07 12:30", "plan", *"-----"],
    ]
    assert headings.index("GPU") == plan.index("NVIDIA") == blob.index("NVIDIA")
    assert total == f"{kept.folder}: 3 files, 2.1 MB of at most 5.0 GB"


def test_list_says_what_is_refused(kept, capsys):
    (path,) = (p for p in kept.folder.glob("*.plan") if p.stat().st_size > 100_000)
    path.chmod(0o644)
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"  refused: {path} is open to other users (mode 0644)"
    assert re.match(r"2\.0 MB +2026-03-09 12:30 +plan +- +- ", lines[1])
    assert lines[-1].endswith(": 3 files, 2.1 MB of at most 5.0 GB")


@pytest.mark.parametrize("words", [["list"], ["clear"], ["clear", "--older-than", "3"]])
def test_nothing_there(tmp_path, capsys, words):
    assert run(*words) == 0
    said = "0 B of at most 5.0 GB" if words == ["list"] else "0 B freed"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'cache/ncsn_fast/engines'}: 0 files")
    assert line.endswith(said)
    assert list(tmp_path.iterdir()) == []


def test_clear(kept, capsys):
    assert run("clear") == 0
    assert capsys.readouterr().out == f"{kept.folder}: 3 files deleted, 2.1 MB freed\n"
    assert kept.entries() == []


def test_clear_what_is_old(kept, capsys):
    now = time.time()
    for path, days in zip(sorted(kept.folder.glob("*.plan")), (1.4, 1.6), strict=True):
        os.utime(path, (now - days * DAY,) * 2)
    (blob,) = kept.folder.glob("*.blob")
    os.utime(blob, (now, now))
    young, old = sorted(kept.folder.glob("*.plan"))
    assert run("clear", "--older-than", "1.5") == 0
    assert capsys.readouterr().out.startswith(f"{kept.folder}: 1 file deleted, ")
    assert (young.exists(), old.exists(), blob.exists()) == (True, False, True)


def test_another_folder(tmp_path, capsys, kept):
    other = PlanCache(tmp_path / "other")
    other.fetch(FACTS, lambda: (b"plan", {}))
    assert run("list", "--folder", str(other.folder)) == 0
    assert f"{other.folder}: 1 file, " in capsys.readouterr().out
    assert run("clear", "--folder", str(other.folder)) == 0
    assert (other.entries(), len(kept.entries())) == ([], 3)


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "soon"])
def test_bad_days(kept, capsys, days):
    assert run("clear", f"--older-than={days}") == 2
    assert "--older-than" in capsys.readouterr().err
    assert len(kept.entries()) == 3


def test_usage(capsys):
    assert run() == 2
    assert "{list, clear}" in capsys.readouterr().err.replace("'", "")
    assert run("list", "--older-than", "3") == 2


@pytest.mark.parametrize("name", ["list", "clear"])
def test_refused_folder(kept, capsys, name):
    kept.folder.chmod(0o755)
    assert run(name) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {kept.folder}: is open to other users (mode 0755); ")
    assert said.out == ""
    kept.folder.chmod(0o700)
    assert len(kept.entries()) == 3


def test_bad_limit(monkeypatch, capsys):
    monkeypatch.setenv("NCSN_FAST_CACHE_LIMIT", "much")
    assert run("list") == 1
    assert "NCSN_FAST_CACHE_LIMIT must be a size such as 5GB" in capsys.readouterr().err


def test_under_one_name(kept, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ncsn-fast", "cache", "clear"])
    assert dispatcher.main() == 0
    assert "3 files deleted" in capsys.readouterr().out
