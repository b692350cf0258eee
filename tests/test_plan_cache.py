"""The cache of compiled engines: built once, kept sealed, handed out to nobody but its builder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import logging
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import plan_cases
import pytest
from plan_cases import FACTS, NOTES, SECONDS, SPOILED, flip_last, mode, spoil_link

from ncsn_fast import files
from ncsn_fast.engines import plan_cache, plan_files, sealed
from ncsn_fast.engines.base import EngineError
from ncsn_fast.engines.plan_cache import (
    PlanCache,
    PlanRefused,
    kernels_digest,
    seal,
    unseal,
    write_plan,
)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("NCSN_FAST_CACHE_LIMIT", raising=False)


@pytest.fixture
def cache() -> PlanCache:
    return PlanCache()


def build(content: bytes = b"plan") -> Callable[[], tuple[bytes, dict[str, Any]]]:
    return lambda: (content, dict(NOTES))


def never() -> tuple[bytes, dict[str, Any]]:
    raise AssertionError("built although it is kept")


def plan_of(cache: PlanCache, facts: dict[str, Any] = FACTS) -> Path:
    """Where a plan must be, without the code under test."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return cache.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.plan"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# What is kept, and where


def test_built_once(cache, tmp_path):
    first = cache.fetch(FACTS, build())
    again = PlanCache().fetch(dict(reversed(FACTS.items())), never)
    assert (first.content, first.facts, first.notes, first.built) == (b"plan", FACTS, NOTES, True)
    assert (again.content, again.facts, again.notes, again.built) == (b"plan", FACTS, NOTES, False)
    assert cache.folder == tmp_path / "cache" / "ncsn_fast" / "engines"
    assert names(cache.folder) == {plan_of(cache).name}


def test_tuples_are_lists(cache):
    given = {**FACTS, "shapes": ((1, 3, 8, 8), (4, 3, 8, 8))}
    assert cache.fetch(given, build()).facts == FACTS
    assert cache.fetch(FACTS, never).built is False


@pytest.mark.parametrize("level", [4, "3", 3.0, True, None, [3], {"3": 3}])
def test_every_fact_counts(cache, level):
    cache.fetch(FACTS, build(b"old"))
    assert cache.fetch({**FACTS, "level": level}, build(b"new")).content == b"new"
    assert cache.fetch(FACTS, never).content == b"old"
    assert cache.fetch({**FACTS, "extra": None}, build(b"3rd")).content == b"3rd"


@pytest.mark.parametrize("bad", [float("nan"), b"bytes", {1, 2}, object()])
def test_facts_and_notes_are_json(cache, bad):
    with pytest.raises(ValueError, match="must be plain JSON"):
        cache.fetch({"fact": bad}, never)
    with pytest.raises(ValueError, match="must be plain JSON"):
        cache.fetch(FACTS, lambda: (b"plan", {"note": bad}))
    assert cache.entries() == []


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_modes_whatever_the_umask(cache, tmp_path, umask):
    before = os.umask(umask)
    try:
        cache.fetch(FACTS, build())
        write_plan(tmp_path / "named" / "digits.plan", b"plan", FACTS, NOTES)
    finally:
        os.umask(before)
    for folder in ("cache", "cache/ncsn_fast", "cache/ncsn_fast/engines", "config/ncsn_fast"):
        assert mode(tmp_path / folder) == 0o700, folder
    private = [*cache.folder.iterdir(), sealed.key_path(), tmp_path / "named" / "digits.plan"]
    assert len(private) == 4
    assert {mode(path) for path in private} == {0o600}


# What is refused in the cache is made anew


@pytest.mark.parametrize("how", [*SPOILED, "other key", "other facts"])
def test_fetch_replaces_what_it_refuses(cache, tmp_path, monkeypatch, caplog, how):
    cache.fetch(FACTS, build(b"old"))
    path = plan_of(cache)
    if how == "other key":
        reason = "is damaged, or was written by somebody else"
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    elif how == "other facts":
        reason = "was built for something else: level expected 3, found 4"
        cache.fetch({**FACTS, "level": 4}, build())
        plan_of(cache, {**FACTS, "level": 4}).replace(path)
    else:
        spoil, reason = SPOILED[how]
        spoil(path)
    again = cache.fetch(FACTS, build(b"new"))
    assert (again.content, again.built) == (b"new", True)
    (said,) = warnings(caplog)
    assert said.startswith(f"{path} {reason}")
    assert said.endswith("; it is not used but made anew")
    assert cache.fetch(FACTS, never).content == b"new"
    assert mode(path) == 0o600
    assert len(warnings(caplog)) == 1


def test_a_folder_in_a_plans_place(cache, caplog):
    cache.fetch(FACTS, build())
    plan_of(cache).unlink()
    plan_of(cache).mkdir(mode=0o700)
    assert cache.fetch(FACTS, build(b"new")).content == b"new"
    refused, kept = warnings(caplog)
    assert "is not a regular file" in refused
    assert "not kept" in kept
    assert cache.clear() == (0, 0)


# Folder and key


def wrong_folder(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes a folder that must be refused; the reason to expect."""
    folder.parent.mkdir(parents=True)
    me = os.getuid()
    if kind == "link":
        (folder.parent / "real").mkdir(mode=0o700)
        folder.symlink_to("real")
        return "is a symbolic link, not a folder; choose another folder"
    if kind == "file":
        folder.touch(0o600)
        return "is not a folder; choose another folder"
    folder.mkdir()
    if kind == "foreign":
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
        return f"belongs to user {me}, not {me + 1}; choose another folder"
    folder.chmod(int(kind, 8))
    return f"is open to other users (mode {kind}); if none of them can have changed it, chmod 700 "


@pytest.mark.parametrize("kind", ["link", "file", "foreign", "0755", "0710", "0701", "0777"])
def test_folders_that_are_not_ours_alone(cache, monkeypatch, kind):
    reason = re.escape(f"{cache.folder}: {wrong_folder(kind, cache.folder, monkeypatch)}")
    for call in (
        lambda: cache.fetch(FACTS, never),
        lambda: cache.put("timing", FACTS, b""),
        lambda: cache.get("timing", FACTS),
        cache.entries,
        cache.clear,
    ):
        with pytest.raises(PlanRefused, match=reason):
            call()


def test_the_remedy_helps(cache):
    cache.folder.mkdir(parents=True, mode=0o755)
    with pytest.raises(PlanRefused) as refused:
        cache.fetch(FACTS, never)
    command = re.search(r"chmod 700 \S+(?=;)", refused.value.remedy)
    assert command is not None
    assert os.system(command[0]) == 0
    assert cache.fetch(FACTS, build()).built


WRONG_KEYS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "short": (lambda key: os.truncate(key, 31), "is no key: 31 bytes, expected 32"),
    "long": (lambda key: key.write_bytes(bytes(33)), "is no key: 33 bytes, expected 32"),
    "empty": (lambda key: os.truncate(key, 0), "is no key: 0 bytes, expected 32"),
    "readable": (lambda key: key.chmod(0o644), "is open to other users (mode 0644)"),
    "link": (spoil_link, "is a symbolic link"),
}


@pytest.mark.parametrize("how", WRONG_KEYS)
def test_keys_that_are_not_to_be_trusted(cache, how):
    cache.fetch(FACTS, build())
    cache.put("timing", FACTS, b"")
    key, (spoil, reason) = sealed.key_path(), WRONG_KEYS[how]
    spoil(key)
    for call in (
        lambda: cache.fetch({**FACTS, "level": 4}, never),
        lambda: cache.get("timing", FACTS),
        lambda: cache.put("timing", FACTS, b""),
        cache.entries,
    ):
        with pytest.raises(PlanRefused, match=re.escape(f"{key}: {reason}")) as refused:
            call()
        assert "delete it: a new one is made" in refused.value.remedy
    key.unlink()
    assert cache.fetch(FACTS, build()).built


def test_a_key_of_another_user(monkeypatch):
    seal(b"", {}, {})
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(PlanRefused, match=f"cache.key: belongs to user {me}, not {me + 1}"):
        seal(b"", {}, {})


@pytest.mark.parametrize("links", [True, False])
def test_the_first_key_stays(monkeypatch, links):
    """Another process makes the key just when this one has decided to."""
    draw, first = sealed.secrets.token_bytes, []

    def meanwhile(size: int) -> bytes:
        monkeypatch.setattr(sealed.secrets, "token_bytes", draw)
        first.append(sealed.secret(create=True))
        return draw(size)

    if not links:
        monkeypatch.setattr(files.os, "link", no_links)
    monkeypatch.setattr(sealed.secrets, "token_bytes", meanwhile)
    assert sealed.secret(create=True) == first[0] == sealed.key_path().read_bytes()


def no_links(*_: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_the_key_is_private_without_hard_links(monkeypatch):
    monkeypatch.setattr(files.os, "link", no_links)
    before = os.umask(0)
    try:
        assert unseal(seal(b"plan", {}, {}), "here").content == b"plan"
    finally:
        os.umask(before)
    assert mode(sealed.key_path()) == 0o600


def test_systems_without_owners(monkeypatch, tmp_path):
    """The module can be imported there; nothing is handed out."""
    (tmp_path / "a.plan").touch(0o600)
    for name in ("getuid", "O_NOFOLLOW", "O_NONBLOCK"):
        monkeypatch.delattr(os, name)
    module = runpy.run_path(str(sealed.__file__))
    with pytest.raises(EngineError, match="this system does not say whose it is"):
        module["read_plan"](tmp_path / "a.plan")


# Many processes


@pytest.fixture(scope="module")
def processes() -> Any:
    """Real processes, which share nothing but files; what they import is imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ncsn_fast.engines.plan_cache"])
    return context


@contextlib.contextmanager
def started(context: Any, target: Callable[..., None], *args: Any) -> Any:
    process = context.Process(target=plan_cases.in_home, args=(dict(os.environ), target, *args))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "a process does not answer"
        time.sleep(0.01)


def test_of_eight_processes_one_builds(processes, tmp_path):
    barrier = processes.Barrier(8)
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(started(processes, plan_cases.race, tmp_path, number, barrier))
            for number in range(8)
        ]
        for process in running:
            process.join(SECONDS)
        assert [process.exitcode for process in running] == [0] * 8
    got = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(8)]
    (builder,) = (number for number in range(8) if got[number]["built"])
    assert {each["content"] for each in got} == {f"by {builder}"}
    assert {each["key"] for each in got} == {str(sealed.key_path().read_bytes())}
    assert names(sealed.key_path().parent) == {"cache.key"}


@pytest.mark.parametrize("where", ["building", "writing"])
def test_who_waits_builds_when_the_builder_is_killed(
    cache, processes, tmp_path, caplog, monkeypatch, where
):
    monkeypatch.setattr(plan_files, "_PATIENCE", 0.05)
    caplog.set_level(logging.INFO)
    got: list[Any] = []
    waiter = threading.Thread(target=lambda: got.append(cache.fetch(FACTS, build(b"second"))))
    with started(processes, plan_cases.hang, tmp_path / "flag", where) as builder:
        wait_for((tmp_path / "flag").exists)
        waiter.start()
        wait_for(lambda: "another process builds this engine" in caplog.text)
        if where == "writing":
            (entry,) = cache.entries()
            assert entry.path == plan_of(cache)
            assert entry.problem == "is unfinished: it is being written, or who wrote it was killed"
        assert cache.clear() == (0, 0)
        time.sleep(0.2)
        assert not got
        os.kill(builder.pid, signal.SIGKILL)
        waiter.join(SECONDS)
    assert [(stored.content, stored.built) for stored in got] == [(b"second", True)]
    assert names(cache.folder) == {plan_of(cache).name}
    assert caplog.text.count("another process builds this engine") == 1
    assert cache.fetch(FACTS, never).content == b"second"


def test_threads_are_as_processes(cache):
    built: list[int] = []

    def make() -> tuple[bytes, dict[str, Any]]:
        built.append(1)
        time.sleep(0.1)
        return b"plan", {}

    threads = [threading.Thread(target=cache.fetch, args=(FACTS, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(built) == 1


def test_other_engines_do_not_wait(cache):
    def make() -> tuple[bytes, dict[str, Any]]:
        return cache.fetch({**FACTS, "level": 4}, build(b"inner")).content + b" outer", {}

    assert cache.fetch(FACTS, make).content == b"inner outer"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError, MemoryError])
def test_who_fails_keeps_nothing(cache, error):
    def fail() -> Any:
        raise error("no")

    with pytest.raises(error, match=r"^no$"):
        cache.fetch(FACTS, fail)
    assert names(cache.folder) == set()
    with filelock.FileLock(plan_of(cache).with_suffix(".lock"), timeout=0):
        pass
    assert cache.fetch(FACTS, build(b"second")).content == b"second"


def test_who_waits_builds_when_the_builder_fails(cache):
    building, go = threading.Event(), threading.Event()
    got: list[Any] = []

    def fail() -> Any:
        building.set()
        assert go.wait(SECONDS)
        raise RuntimeError("no")

    def first() -> None:
        with contextlib.suppress(RuntimeError):
            cache.fetch(FACTS, fail)

    threads = [
        threading.Thread(target=first),
        threading.Thread(target=lambda: got.append(cache.fetch(FACTS, build(b"second")))),
    ]
    threads[0].start()
    assert building.wait(SECONDS)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(SECONDS)
    assert [(stored.content, stored.built) for stored in got] == [(b"second", True)]


# Where nothing can be kept


def test_a_full_disk(cache, caplog, full_disk):
    cache.fetch({**FACTS, "level": 4}, build())
    with full_disk(4096):
        stored = cache.fetch(FACTS, build(bytes(10_000)))
    assert (stored.content, stored.notes, stored.built) == (bytes(10_000), NOTES, True)
    (said,) = warnings(caplog)
    assert "the engine just built is used but not kept: cannot write" in said
    assert "File too large" in said
    assert names(cache.folder) == {plan_of(cache, {**FACTS, "level": 4}).name}
    assert cache.fetch(FACTS, build()).built


@pytest.mark.parametrize("what", ["cache", "config"])
def test_no_folder_can_be_made(tmp_path, caplog, what):
    (tmp_path / what).touch()  # even root makes no folder in a file
    cache = PlanCache()
    assert cache.fetch(FACTS, build()).content == b"plan"
    (said,) = warnings(caplog)
    assert said.startswith("the engine just built is used but not kept: ")
    cache.put("timing", FACTS, b"times")
    assert warnings(caplog)[1].startswith("timing is not kept: ")
    assert cache.get("timing", FACTS) is None


def test_what_is_kept_is_used_where_nothing_can_be_written(cache, monkeypatch):
    cache.fetch(FACTS, build())

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "utime", "replace"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr(filelock.FileLock, "_acquire", read_only)
    assert cache.fetch(FACTS, never).content == b"plan"


def test_what_cannot_be_deleted(caplog, monkeypatch):
    cache = PlanCache(limit=1)
    cache.fetch({**FACTS, "level": 4}, build())

    def refuse(_: Any) -> bool:
        raise OSError(30, "Read-only file system")

    caplog.clear()
    monkeypatch.setattr(plan_files, "drop", refuse)
    assert cache.fetch(FACTS, build()).content == b"plan"
    (said,) = warnings(caplog)
    assert "no room was made in the cache: [Errno 30] Read-only file system" in said
    assert cache.fetch(FACTS, never).content == b"plan"


# The limit


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


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (10**13, "10000.0 GB")],
)
def test_size_text(size, text):
    assert plan_files.size_text(size) == text


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
    for unrelated in ("engines/sealed.py", "engines/cpu.py", "engines/__init__.py"):
        with open(tmp_path / unrelated, "a") as file:
            file.write("# changed\n")
    (tmp_path / "kernels" / "notes.txt").touch()
    assert kernels_digest() == found
    digests = {found}
    for number, source in enumerate(("kernels/rows.py", "engines/graph.py", "engines/new.py"), 2):
        with open(tmp_path / source, "a") as file:
            file.write("# changed\n")
        digests.add(kernels_digest())
        assert len(digests) == number
    (tmp_path / "engines" / "new.py").rename(tmp_path / "engines" / "newer.py")
    assert kernels_digest() not in digests


def test_what_is_skipped_exists():
    engines = importlib.resources.files("ncsn_fast.engines").iterdir()
    assert {Path(file.name).stem for file in engines} >= plan_cache._COMPILE_NOTHING


@pytest.mark.parametrize("module", [sealed, plan_files, plan_cache])
def test_nothing_is_run_that_was_read(module):
    assert not re.search(r"pickle|marshal|\beval\b|\bexec\b", Path(module.__file__).read_text())
