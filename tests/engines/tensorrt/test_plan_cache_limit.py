"""The cache of compiled engines: its limit, other bytes in it, lists, clearing, and its sources."""

from __future__ import annotations

import importlib.resources
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import filelock
import pytest
from plan_cases import (
    FACTS,
    NOTES,
    build,
    flip_last,
    mode,
    names,
    never,
    plan_of,
    warnings,
)  # fmt: skip

from ncsn_fast.engines.tensorrt import plan_cache, plan_files, signed_file
from ncsn_fast.engines.tensorrt.plan_cache import (
    PlanCache,
    kernels_digest,
)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("NCSN_FAST_CACHE_LIMIT", raising=False)


@pytest.fixture
def cache() -> PlanCache:
    return PlanCache()


def of_level(level: int) -> dict[str, Any]:
    return {**FACTS, "level": level}


def age(cache: PlanCache, days: dict[int, float]) -> None:
    """Sets the last use of plans, in days ago."""
    for level, ago in days.items():
        when = time.time() - ago * 86400
        os.utime(plan_of(cache, of_level(level)), (when, when))


@pytest.fixture
def three(caplog: pytest.LogCaptureFixture) -> PlanCache:
    """Three plans of 10 000 bytes and something each, in a cache that three fit in; 2 is oldest."""
    cache = PlanCache(limit=32_000)
    for level in (1, 2, 3):
        cache.fetch(of_level(level), build(bytes(10_000)))
    age(cache, {1: 1, 2: 3, 3: 2})
    assert not warnings(caplog)
    return cache


def levels(cache: PlanCache) -> set[int]:
    return {entry.facts["level"] for entry in cache.entries()}


def test_the_oldest_makes_room(three):
    assert levels(three) == {1, 2, 3}
    three.fetch(of_level(4), build(bytes(10_000)))
    assert levels(three) == {1, 3, 4}


def test_a_hit_is_a_use(three):
    three.fetch(of_level(2), never)
    three.fetch(of_level(4), build(bytes(10_000)))
    assert levels(three) == {1, 2, 4}


def test_as_many_as_needed_make_room(three):
    three.fetch(of_level(4), build(bytes(20_000)))
    assert levels(three) == {1, 4}


def test_the_limit_itself_is_allowed(three):
    size = plan_of(three, of_level(1)).stat().st_size
    for limit, kept in ((3 * size, {1, 3, 4}), (3 * size - 1, {1, 4})):
        cache = PlanCache(limit=limit)
        cache.clear(older_than=2.5 * 86400)  # 2
        cache.fetch(of_level(4), build(bytes(10_000)))
        assert levels(cache) == kept
        plan_of(cache, of_level(4)).unlink()


def test_a_locked_plan_does_not_make_room(three):
    with filelock.FileLock(plan_of(three, of_level(2)).with_suffix(".lock")):
        three.fetch(of_level(4), build(bytes(10_000)))
    assert levels(three) == {1, 2, 4}


def test_a_plan_larger_than_the_limit_is_kept_alone(three, caplog):
    three.fetch(of_level(4), build(bytes(40_000)))
    assert levels(three) == {4}
    (said,) = warnings(caplog)
    assert "take 40.2 kB, the limit is 32.0 kB; NCSN_FAST_CACHE_LIMIT raises it" in said
    assert not three.fetch(of_level(4), never).built


def test_the_newest_stays_though_its_clock_is_behind(three, monkeypatch):
    """Files of other machines may seem to be of the future."""
    age(three, {1: -1, 2: -1, 3: -1})
    three.fetch(of_level(4), build(bytes(10_000)))
    assert 4 in levels(three)
    assert len(levels(three)) == 3


def test_remains_of_killed_processes_count(three):
    left = three.folder / f".{plan_of(three, of_level(5)).name}.x_1.tmp"
    left.write_bytes(bytes(5_000))
    os.utime(left, (1, 1))
    three.fetch(of_level(3), never)
    assert left.exists()
    three.put("timing", FACTS, b"")  # 30 kB of plans, 5 kB of remains
    assert not left.exists()
    assert {1, 2, 3} <= {entry.facts.get("level") for entry in three.entries()}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9), ("5 GiB", 5 * 2**30), ("1.5gb", 15 * 10**8), ("512MiB", 2**29),
        ("2T", 2 * 10**12), ("3k", 3000), ("1000000", 10**6), ("7 B", 7), ("0", 0),
        ("", 10 * 2**30),
    ],
)  # fmt: skip
def test_limit_of_the_environment(monkeypatch, text, size):
    monkeypatch.setenv("NCSN_FAST_CACHE_LIMIT", text)
    assert PlanCache().limit == size
    assert PlanCache(limit=12).limit == 12


@pytest.mark.parametrize("text", ["-1", "much", "5 gallons", "1e9", "GB", "5GB 3", "nan"])
def test_bad_limits(monkeypatch, text):
    monkeypatch.setenv("NCSN_FAST_CACHE_LIMIT", text)
    with pytest.raises(ValueError, match="NCSN_FAST_CACHE_LIMIT must be a size such as 5GB"):
        PlanCache()
    with pytest.raises(ValueError, match="at least 0 bytes; got -1"):
        PlanCache(limit=-1)


def test_default_limit():
    assert PlanCache().limit == 10 * 2**30


# Blobs, entries, clear


def test_blobs(cache):
    assert cache.get("timing", FACTS) is None
    assert not cache.folder.exists()
    cache.put("timing", FACTS, b"old")
    cache.put("timing", FACTS, b"new")
    cache.put("other", FACTS, b"other")
    cache.fetch(FACTS, build())
    assert PlanCache().get("timing", FACTS) == b"new"
    assert cache.get("other", FACTS) == b"other"
    assert cache.get("timing", of_level(4)) is None
    assert sorted(Path(name).suffix for name in names(cache.folder)) == [".blob", ".blob", ".plan"]
    assert {mode(path) for path in cache.folder.iterdir()} == {0o600}


def test_a_blob_that_is_refused(cache, caplog):
    cache.put("timing", FACTS, b"times")
    (blob,) = cache.folder.glob("*.blob")
    flip_last(blob)
    assert cache.get("timing", FACTS) is None
    (said,) = warnings(caplog)
    assert said.startswith(f"{blob} is damaged")
    cache.put("timing", FACTS, b"times")
    assert cache.get("timing", FACTS) == b"times"


def test_a_blob_is_no_plan(cache, caplog):
    cache.put("timing", FACTS, b"times")
    (blob,) = cache.folder.glob("*.blob")
    blob.rename(plan_of(cache))
    assert cache.fetch(FACTS, build()).content == b"plan"
    assert "was built for something else: blob expected nothing, found 'timing'" in caplog.text


def test_entries(three):
    (three.folder / "notes.txt").write_text("mine")
    flip_last(plan_of(three, of_level(2)))
    age(three, {2: 3})
    plan_of(three, of_level(3)).rename(three.folder / f"{'0' * 64}.plan")
    newest, renamed, damaged = three.entries()
    size = plan_of(three, of_level(1)).stat().st_size
    assert (newest.path, newest.size) == (plan_of(three, of_level(1)), size)
    assert (newest.facts, newest.notes, newest.problem) == (of_level(1), NOTES, None)
    assert newest.last_use == plan_of(three, of_level(1)).stat().st_mtime
    assert renamed.problem == ("was built for something else: its name is not the key of its facts")
    assert damaged.problem == "is damaged, or was written by somebody else"
    assert (damaged.path, damaged.facts, damaged.notes) == (plan_of(three, of_level(2)), {}, {})


def test_nothing_there(cache, tmp_path):
    assert cache.entries() == []
    assert cache.clear() == (0, 0)
    assert list(tmp_path.iterdir()) == []


def test_clear(three):
    (three.folder / "notes.txt").write_text("mine")
    size = sum(path.stat().st_size for path in three.folder.glob("*.plan"))
    assert three.clear() == (3, size)
    assert names(three.folder) == {"notes.txt"}
    assert three.fetch(of_level(1), build()).built


def test_clear_what_is_old(three):
    left = three.folder / f".{plan_of(three, of_level(2)).name}.x_1.tmp"
    left.write_bytes(bytes(500))
    os.utime(left, (1, 1))
    size = plan_of(three, of_level(2)).stat().st_size
    assert three.clear(older_than=2.5 * 86400) == (1, size + 500)
    assert levels(three) == {1, 3}
    assert not left.exists()


def test_clear_spares_what_is_held_or_used(three, monkeypatch):
    with filelock.FileLock(plan_of(three, of_level(2)).with_suffix(".lock")):
        assert three.clear()[0] == 2
    assert levels(three) == {2}
    found = plan_files.groups(three.folder)
    three.fetch(of_level(2), never)
    assert [plan_files.drop(group) for group in found] == [False]
    assert levels(three) == {2}


def test_a_folder_of_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = PlanCache("~/mine")
    cache.fetch(FACTS, build())
    assert plan_of(cache).parent == tmp_path / "mine"
    assert plan_of(cache).exists()


# The digest of our sources


def test_kernels_digest(tmp_path, monkeypatch):
    for folder in ("kernels", "engines"):
        shutil.copytree(importlib.resources.files(f"ncsn_fast.{folder}"), tmp_path / folder)
    found = kernels_digest()
    monkeypatch.setattr(
        plan_cache.importlib.resources, "files", lambda name: tmp_path / name.rpartition(".")[2]
    )
    assert kernels_digest() == found
    assert re.fullmatch("[0-9a-f]{64}", found)
    for unrelated in (
        "engines/tensorrt/signed_file.py",
        "engines/cpu/engine.py",
        "engines/__init__.py",
    ):
        with open(tmp_path / unrelated, "a") as file:
            file.write("# changed\n")
    (tmp_path / "kernels" / "notes.txt").touch()
    assert kernels_digest() == found
    digests = {found}
    sources = (
        "kernels/rows.py", "engines/lowering/graph.py", "engines/new.py",
        "engines/nested/deeper/new.py",
    )  # fmt: skip
    for number, source in enumerate(sources, 2):
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        with open(tmp_path / source, "a") as file:
            file.write("# changed\n")
        digests.add(kernels_digest())
        assert len(digests) == number
    (tmp_path / "engines" / "new.py").rename(tmp_path / "engines" / "newer.py")
    assert kernels_digest() not in digests


def test_what_is_skipped_exists():
    engines = importlib.resources.files("ncsn_fast.engines")
    for name in plan_cache._COMPILE_NOTHING:
        assert engines.joinpath(f"{name}.py").is_file() or engines.joinpath(name).is_dir(), name


@pytest.mark.parametrize("module", [signed_file, plan_files, plan_cache])
def test_nothing_is_run_that_was_read(module):
    assert not re.search(r"pickle|marshal|\beval\b|\bexec\b", Path(module.__file__).read_text())
