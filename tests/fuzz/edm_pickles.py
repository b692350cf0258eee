"""Damaged pickles of EDM: their bytes, their opcodes and the storages in them."""

from __future__ import annotations

import functools
import pickletools
import random
import struct
from collections.abc import Callable

import harness
import mutations
from golden import FOLDER

import ncsn_fast
from ncsn_fast import CheckpointError

# Opcodes that others are replaced by: of data, of calls, of marks, and of what no data need.
_OTHERS = b"N)]}\x8f(.0Rb\x81\x85\x86\x87tsuaed\x93\x94QPoi\x89\x88\x97\x82\x05"
_TEXTS = (
    "", "x", "posix", "system", "builtins", "eval", "torch", "EDMPrecond", "SongUNet", "Conv2d",
    "_init_kwargs", "_parameters", "_modules", "ema", "state", "\ud800", "x" * 300,
)  # fmt: skip


@functools.cache
def corpus() -> list[bytes]:
    """Returns a sound file, opcode for opcode."""
    content = (FOLDER / "edm_source_trap.pkl").read_bytes()
    places = [place for _, _, place in pickletools.genops(content)]
    return [content[a:b] for a, b in zip(places, [*places[1:], len(content)], strict=True)]


def _text(code: bytes, draw: random.Random) -> bytes:
    text = draw.choice(_TEXTS).encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(text)) + text


def _number(code: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return b"\x8a\x0a" + draw.randbytes(10)  # 80 bits
    if draw.random() < 0.3:
        return b"G" + struct.pack(">d", draw.choice((0.0, -1.0, 1e308, float("nan"))))
    return b"J" + struct.pack("<i", draw.choice((0, 1, -1, 7, 2**31 - 1, draw.randrange(4096))))


def _bytes(code: bytes, draw: random.Random) -> bytes:
    """Damages a storage, or any other opcode's argument."""
    if code[:1] == b"B":
        inner = mutations.damaged(code[5:], draw)
        return b"B" + struct.pack("<I", len(inner)) + inner
    return mutations.damaged(code, draw)


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _text, _number, _number, _bytes, _bytes,
    lambda code, draw: b"",
    lambda code, draw: code * 2,
    lambda code, draw: bytes([draw.choice(_OTHERS)]),
    lambda code, draw: b"h" + bytes([draw.randrange(256)]),  # another object of the memo
)  # fmt: skip
_KINDS = {"text": b"X\x8c", "number": b"JKMG\x88\x89", "bytes": b"BC"}


def mutate(seed: int) -> bytes:
    """Makes a damaged file."""
    draw, codes = random.Random(seed), list(corpus())
    if draw.random() < 0.15:
        return mutations.damaged(b"".join(codes), draw)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(codes))
        if draw.random() < 0.7:  # what holds a value
            kind = _KINDS[draw.choice(list(_KINDS))]
            at = draw.choice([k for k, code in enumerate(codes) if code[:1] in _one(kind)])
        codes[at] = draw.choice(CHANGES)(codes[at], draw)
    return b"".join(codes)


@functools.cache
def _one(codes: bytes) -> frozenset[bytes]:
    return frozenset(bytes([code]) for code in codes)


def check(content: bytes) -> dict[str, bool]:
    """Reads one file."""
    path = harness.folder() / "edm.pkl"
    path.write_bytes(content)
    read = functools.partial(ncsn_fast.load, path)
    return {"model": harness.reads("model", read, (CheckpointError,), path.name)}
