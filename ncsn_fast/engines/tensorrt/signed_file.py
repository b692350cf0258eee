"""Signed files: compiled engines that are only loaded by the account that wrote them.

A compiled engine is native code, and running someone else's is running their program: NVIDIA says
so of TensorRT plans, whose own validity check does not protect against tampering. So content is
stored with an HMAC-SHA256, whose key lies in the user's configuration folder, and is returned only
if the HMAC matches and nobody else could have written the file:

    magic, version (12 bytes) | HMAC of all the rest and of these 12 (32) |
    length of the header (8, little-endian) | header: facts and notes, JSON | content

Nothing after the HMAC is parsed before it is verified. This protects from files of others, damage
and mix-ups; not from programs that run as the same user, which can read the key.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import secrets
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncsn_fast.data import files
from ncsn_fast.engines.base import EngineError

_MAGIC = b"ncsnplan"
_VERSION = 1
_PREFIX = _MAGIC + _VERSION.to_bytes(4, "little")
_REMEDY = "delete it and build the engine anew on this machine"
_KEY_BYTES = _MAC_BYTES = 32
_LENGTH_BYTES = 8
_START = len(_PREFIX) + _MAC_BYTES
# Neither follow a link nor wait for a pipe, on systems that have these flags.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class PlanRefused(EngineError):
    """Error of a compiled engine, a folder of them or a signing key that is not trusted.

    Attributes: path, reason, remedy; the message is all three.
    """

    def __init__(self, path: str | Path, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)
        self.path, self.reason, self.remedy = str(path), reason, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


@dataclass(frozen=True)
class Stored:
    """A compiled engine, or other bytes, with facts and notes.

    Attributes:
        content: the engine itself (a TensorRT plan).
        facts: everything it depends on. Equal facts, equal key.
        notes: information that is not part of the key: measured error, build time.
        built: whether this call built it.
    """

    content: bytes
    facts: dict[str, Any]
    notes: dict[str, Any]
    built: bool


def canonical(value: Any) -> str:
    """Returns the canonical JSON of a value: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: JSON cannot represent it: NaN, bytes, arrays, keys that are not strings.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"facts and notes of an engine must be plain JSON (strings, finite numbers, lists, "
            f"dicts with strings as names): {error}; got {value!r}"
        ) from error
    return text


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a mapping as it comes back from JSON: tuples become lists."""
    return json.loads(canonical(dict(value)))


def key_path() -> Path:
    """Returns the path of the signing key: ncsn_fast/cache.key in $XDG_CONFIG_HOME or ~/.config."""
    return files.user_folder("XDG_CONFIG_HOME", ".config") / "ncsn_fast" / "cache.key"


def signing_key(*, create: bool = False) -> bytes | None:
    """Returns the signing key of the user, 32 random bytes; None if it does not exist.

    With `create`, a missing key is created; of several processes that do so at once, one succeeds
    and all get its key.

    Raises:
        PlanRefused: the file does not belong to this user alone, or is no key.
        OSError: the key cannot be stored.
    """
    path = key_path()
    remedy = "delete it: a new one is made, and engines are built anew"
    if create and not os.path.lexists(path):
        make_folders(path.parent)
        with files.atomic_write(path, overwrite=False, mode=0o600) as temporary:
            temporary.write_bytes(secrets.token_bytes(_KEY_BYTES))
    try:
        key = read_private(path, remedy)
    except FileNotFoundError:
        return None
    if len(key) != _KEY_BYTES:
        raise PlanRefused(path, f"is no key: {len(key)} bytes, expected {_KEY_BYTES}", remedy)
    return key


def sign(content: bytes, facts: Mapping[str, Any], notes: Mapping[str, Any]) -> bytes:
    """Returns a signed file of a compiled engine, under this user's key, created if missing."""
    header = canonical({"facts": dict(facts), "notes": dict(notes)}).encode()
    rest = (len(header).to_bytes(_LENGTH_BYTES, "little"), header, content)
    key = signing_key(create=True)
    if key is None:
        raise OSError(errno.ENOENT, "the key vanished when it had been made", str(key_path()))
    return b"".join((_PREFIX, _mac(key, *rest), *rest))


def verify(data: bytes, source: str) -> Stored:
    """Verifies a signed file and returns its content, facts and notes.

    Raises:
        PlanRefused: not a signed file, of another user, or modified; the message names the source.
    """
    view = memoryview(data)
    if len(view) < _START or bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise PlanRefused(source, "is no signed file", _REMEDY)
    if bytes(view[: len(_PREFIX)]) != _PREFIX:
        raise PlanRefused(source, f"is a signed file of another version than {_VERSION}", _REMEDY)
    key = signing_key()
    if key is None:
        raise PlanRefused(source, f"cannot be yours: you have no key {key_path()}", _REMEDY)
    if not hmac.compare_digest(view[len(_PREFIX) : _START], _mac(key, view[_START:])):
        raise PlanRefused(source, "is damaged, or was written by somebody else", _REMEDY)
    begin = _START + _LENGTH_BYTES
    end = begin + int.from_bytes(view[_START:begin], "little")
    header = json.loads(bytes(view[begin:end]))
    return Stored(bytes(view[end:]), header["facts"], header["notes"], built=False)


def write_plan(
    path: str | Path, content: bytes, facts: Mapping[str, Any], notes: Mapping[str, Any]
) -> None:
    """Writes a signed file atomically, with mode 0600.

    Raises:
        OSError: it cannot be written; nothing changed.
    """
    signed = sign(content, facts, notes)
    with files.atomic_write(Path(path), mode=0o600) as temporary:
        temporary.write_bytes(signed)


def read_plan(path: str | Path, facts: Mapping[str, Any] | None = None) -> Stored:
    """Reads a signed file of this user.

    Args:
        facts: facts that it must have; None for any.

    Raises:
        PlanRefused: the file is another user's, is damaged, or has other facts; says which facts
            differ, expected and found.
        FileNotFoundError: there is no such file.
    """
    stored = verify(read_private(Path(path), _REMEDY), str(path))
    if facts is not None:
        check_facts(stored, facts, path)
    return stored


def check_facts(stored: Stored, facts: Mapping[str, Any], path: str | Path) -> None:
    """Raises PlanRefused unless a stored plan has these facts; says which differ."""
    expected = as_json(facts)
    names = sorted(
        name
        for name in {*expected, *stored.facts}
        if not (name in expected and name in stored.facts)
        or canonical(expected[name]) != canonical(stored.facts[name])
    )
    if names:
        differences = ", ".join(
            f"{name} expected {_shown(expected, name)}, found {_shown(stored.facts, name)}"
            for name in names
        )
        raise PlanRefused(path, f"was built for something else: {differences}", _REMEDY)


def read_private(path: Path, remedy: str) -> bytes:
    """Reads a regular file that belongs to this user alone, checked on the open descriptor.

    Raises:
        PlanRefused: it does not.   FileNotFoundError: there is no such file.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except PermissionError as error:
        raise PlanRefused(path, "is not yours to read", remedy) from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        remedy = f"name the file itself, or {remedy}"
        raise PlanRefused(path, "is a symbolic link", remedy) from error
    try:
        _check_owner(path, os.fstat(descriptor), 0o600, remedy)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def ensure_private_folder(folder: Path) -> None:
    """Creates a folder of mode 0700, or checks that an existing one belongs to this user alone.

    Raises:
        PlanRefused: it does not.
    """
    make_folders(folder)
    _check_owner(folder, folder.lstat(), 0o700, "choose another folder")


def make_folders(folder: Path) -> None:
    """Creates a folder and its missing parents, all of mode 0700."""
    missing = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            path.mkdir(mode=0o700)


def _check_owner(path: Path, found: os.stat_result, mode: int, remedy: str) -> None:
    """Raises PlanRefused unless a folder (mode 0o700) or regular file is this user's alone."""
    is_kind, kind = (stat.S_ISDIR, "folder") if mode == 0o700 else (stat.S_ISREG, "regular file")
    if not hasattr(os, "getuid"):
        raise PlanRefused(path, "this system does not say whose it is", "use Linux for this engine")
    if not is_kind(found.st_mode):
        what = "a symbolic link, not" if stat.S_ISLNK(found.st_mode) else "not"
        raise PlanRefused(path, f"is {what} a {kind}", remedy)
    if found.st_uid != os.getuid():
        raise PlanRefused(path, f"belongs to user {found.st_uid}, not {os.getuid()}", remedy)
    if found.st_mode & 0o077:
        raise PlanRefused(
            path,
            f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o})",
            f"if none of them can have changed it, chmod {mode:o} {shlex.quote(str(path))}; "
            f"else {remedy}",
        )


def _mac(key: bytes, *pieces: bytes | memoryview) -> bytes:
    mac = hmac.new(key, _PREFIX, "sha256")
    for piece in pieces:
        mac.update(piece)
    return mac.digest()


def _shown(facts: dict[str, Any], name: str) -> str:
    return repr(facts[name]) if name in facts else "nothing"
