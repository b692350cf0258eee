"""Signed files: only who wrote one takes it back, and only as it was written."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import FACTS, NOTES, SPOILED

from ncsn_fast.engines.base import EngineError
from ncsn_fast.engines.tensorrt import signed_file
from ncsn_fast.engines.tensorrt.plan_cache import PlanRefused, read_plan, sign, verify, write_plan


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


# The container


def test_layout_of_the_container():
    data = sign(b"\x00content", FACTS, NOTES)
    key = signed_file.key_path().read_bytes()
    prefix, mac, rest = data[:12], data[12:44], data[44:]
    header = json.dumps({"facts": FACTS, "notes": NOTES}, sort_keys=True, separators=(",", ":"))
    assert len(key) == 32
    assert prefix == b"ncsnplan\x01\x00\x00\x00"
    assert mac == hmac.new(key, prefix + rest, hashlib.sha256).digest()
    assert rest == len(header).to_bytes(8, "little") + header.encode() + b"\x00content"


@given(
    content=st.binary(max_size=300),
    facts=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()),
)
@settings(max_examples=50, deadline=None)
def test_any_content_and_facts_come_back(content, facts):
    stored = verify(sign(content, facts, {"facts": facts}), "here")
    assert (stored.content, stored.facts, stored.notes) == (content, facts, {"facts": facts})


def test_every_flipped_bit_is_refused(monkeypatch):
    data = sign(b"native code", {"a": 1}, {"b": 2})
    monkeypatch.setattr(signed_file.json, "loads", lambda _: pytest.fail("parsed before verified"))
    for i in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[i] ^= 1 << bit
            with pytest.raises(PlanRefused, match="here: is "):
                verify(bytes(flipped), "here")


def test_every_other_length_is_refused():
    data = sign(b"native code", {"a": 1}, {"b": 2})
    for length in range(len(data)):
        with pytest.raises(PlanRefused, match=r"is damaged|is no signed file"):
            verify(data[:length], "here")
    with pytest.raises(PlanRefused, match="is damaged"):
        verify(data + b"\x00", "here")


@given(st.binary(max_size=400), st.sampled_from([b"", b"ncsnplan", b"ncsnplan\x01\x00\x00\x00"]))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_refused(data, start):
    with pytest.raises(PlanRefused):
        verify(start + data, "here")


def test_another_version_is_named():
    data = bytearray(sign(b"native code", FACTS, NOTES))
    data[8] = 2
    with pytest.raises(PlanRefused, match="another version than 1; delete it and build"):
        verify(bytes(data), "here")


def test_another_user_is_refused(tmp_path, monkeypatch):
    data = sign(b"native code", FACTS, NOTES)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    with pytest.raises(PlanRefused, match="you have no key"):
        verify(data, "here")
    assert not (tmp_path / "other").exists()
    sign(b"", {}, {})
    with pytest.raises(PlanRefused, match="here: is damaged, or was written by somebody else; del"):
        verify(data, "here")


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(PlanRefused("a/b", "is bad", "delete it")))
    assert isinstance(error, EngineError)
    assert (error.path, error.reason, error.remedy) == ("a/b", "is bad", "delete it")
    assert str(error) == "a/b: is bad; delete it"


# Files that a user names


def test_named_files(tmp_path):
    path = tmp_path / "digits.plan"
    write_plan(path, b"old", FACTS, NOTES)
    write_plan(path, b"new", FACTS, NOTES)
    assert read_plan(path).content == read_plan(path, FACTS).content == b"new"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["digits.plan"]


def test_other_facts_are_named(tmp_path):
    write_plan(tmp_path / "a.plan", b"plan", FACTS, NOTES)
    wanted = {"model": FACTS["model"], "dtype": "fp16", "shapes": FACTS["shapes"], "gpu": "H100"}
    with pytest.raises(PlanRefused) as refused:
        read_plan(tmp_path / "a.plan", wanted)
    assert refused.value.reason == (
        "was built for something else: dtype expected 'fp16', found 'bf16', "
        "gpu expected 'H100', found nothing, level expected nothing, found 3"
    )
    with pytest.raises(PlanRefused, match="level expected True, found 3"):
        read_plan(tmp_path / "a.plan", {**FACTS, "level": True})


def test_a_failed_write_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "digits.plan"
    write_plan(path, b"old", FACTS, NOTES)
    with full_disk(4096), pytest.raises(OSError, match="cannot write"):
        write_plan(path, bytes(10_000), FACTS, NOTES)
    assert read_plan(path).content == b"old"


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_plan(tmp_path / "none.plan")


@pytest.mark.parametrize("how", SPOILED)
def test_named_files_are_refused(tmp_path, how):
    path, (spoil, reason) = tmp_path / "digits.plan", SPOILED[how]
    write_plan(path, b"plan", FACTS, NOTES)
    spoil(path)
    with pytest.raises(PlanRefused, match=re.escape(f"{path}: {reason}")) as refused:
        read_plan(path)
    assert "delete it and build the engine anew" in refused.value.remedy


def test_chmod_is_the_remedy(tmp_path):
    path = tmp_path / "my digits.plan"
    write_plan(path, b"plan", FACTS, NOTES)
    path.chmod(0o644)
    with pytest.raises(PlanRefused, match=re.escape(f"chmod 600 '{path}'")):
        read_plan(path)
    path.chmod(0o600)
    assert read_plan(path).content == b"plan"


def test_files_of_others_are_refused(tmp_path, monkeypatch):
    path, me = tmp_path / "digits.plan", os.getuid()
    write_plan(path, b"plan", FACTS, NOTES)
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(PlanRefused, match=f"digits.plan: belongs to user {me}, not {me + 1}"):
        read_plan(path)


def test_unreadable_files_are_refused(tmp_path, monkeypatch):
    def denied(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(signed_file.os, "open", denied)
    with pytest.raises(PlanRefused, match="is not yours to read"):
        read_plan(tmp_path / "digits.plan")


def test_owner_is_that_of_the_opened_file(tmp_path, monkeypatch):
    """A file that is exchanged once it is open does not matter, nor what its name means then."""
    path, open_file = tmp_path / "digits.plan", os.open
    write_plan(path, b"plan", FACTS, NOTES)

    def exchanged(name: Any, *flags: Any) -> int:
        descriptor = open_file(name, *flags)
        if Path(name) == path:
            path.unlink()
            path.mkdir(mode=0o777)
        return descriptor

    monkeypatch.setattr(signed_file.os, "open", exchanged)
    assert read_plan(path).content == b"plan"
