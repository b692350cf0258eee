"""The cache of compiled engines: built once, kept signed, handed out to nobody but its builder."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import re
import runpy
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import plan_cases
import pytest
from plan_cases import (
    FACTS,
    NOTES,
    SECONDS,
    SPOILED,
    build,
    mode,
    names,
    never,
    plan_of,
    spoil_link,
    warnings,
)  # fmt: skip

from ncsn_fast.data import files
from ncsn_fast.engines.base import EngineError
from ncsn_fast.engines.tensorrt import plan_files, signed_file
from ncsn_fast.engines.tensorrt.plan_cache import (
    PlanCache,
    PlanRefused,
    sign,
    verify,
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
    private = [*cache.folder.iterdir(), signed_file.key_path(), tmp_path / "named" / "digits.plan"]
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
    key, (spoil, reason) = signed_file.key_path(), WRONG_KEYS[how]
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
    sign(b"", {}, {})
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(PlanRefused, match=f"cache.key: belongs to user {me}, not {me + 1}"):
        sign(b"", {}, {})


@pytest.mark.parametrize("links", [True, False])
def test_the_first_key_stays(monkeypatch, links):
    """Another process makes the key just when this one has decided to."""
    draw, first = signed_file.secrets.token_bytes, []

    def meanwhile(size: int) -> bytes:
        monkeypatch.setattr(signed_file.secrets, "token_bytes", draw)
        first.append(signed_file.signing_key(create=True))
        return draw(size)

    if not links:
        monkeypatch.setattr(files.os, "link", no_links)
    monkeypatch.setattr(signed_file.secrets, "token_bytes", meanwhile)
    assert signed_file.signing_key(create=True) == first[0] == signed_file.key_path().read_bytes()


def no_links(*_: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_the_key_is_private_without_hard_links(monkeypatch):
    monkeypatch.setattr(files.os, "link", no_links)
    before = os.umask(0)
    try:
        assert verify(sign(b"plan", {}, {}), "here").content == b"plan"
    finally:
        os.umask(before)
    assert mode(signed_file.key_path()) == 0o600


def test_systems_without_owners(monkeypatch, tmp_path):
    """The module can be imported there; nothing is handed out."""
    (tmp_path / "a.plan").touch(0o600)
    for name in ("getuid", "O_NOFOLLOW", "O_NONBLOCK"):
        monkeypatch.delattr(os, name)
    module = runpy.run_path(str(signed_file.__file__))
    with pytest.raises(EngineError, match="this system does not say whose it is"):
        module["read_plan"](tmp_path / "a.plan")


# Many processes


@pytest.fixture(scope="module")
def processes() -> Any:
    """Real processes, which share nothing but files; what they import is imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ncsn_fast.engines.tensorrt.plan_cache"])
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
    assert {each["key"] for each in got} == {str(signed_file.key_path().read_bytes())}
    assert names(signed_file.key_path().parent) == {"cache.key"}


@pytest.mark.parametrize("where", ["building", "writing"])
def test_who_waits_builds_when_the_builder_is_killed(
    cache, processes, tmp_path, caplog, monkeypatch, where
):
    monkeypatch.setattr(plan_files, "_NOTICE_AFTER", 0.05)
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
