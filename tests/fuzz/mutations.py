"""Damages of bytes, JSON values, tensors and archives, from one generator of random numbers."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1)


def flip(content: bytearray, draw: random.Random) -> None:
    """Inverts up to eight bits."""
    for _ in range(draw.randint(1, 8)):
        if content:
            content[place(content, draw)] ^= 1 << draw.randrange(8)


def number(content: bytearray, draw: random.Random) -> None:
    """Writes one of NUMBERS over a few bytes."""
    layout = draw.choice((">H", "<H", ">I", "<I", "B"))
    value = draw.choice(NUMBERS) % 256 ** struct.calcsize(layout)
    at = place(content, draw)
    content[at : at + struct.calcsize(layout)] = struct.pack(layout, value)


def cut(content: bytearray, draw: random.Random) -> None:
    """Drops everything from one byte on."""
    del content[place(content, draw) :]


def remove(content: bytearray, draw: random.Random) -> None:
    """Drops up to sixteen bytes."""
    at = place(content, draw)
    del content[at : at + draw.randint(1, 16)]


def repeat(content: bytearray, draw: random.Random) -> None:
    """Writes some bytes two to four times."""
    at, length = place(content, draw), draw.randint(1, 64)
    content[at:at] = content[at : at + length] * draw.randint(1, 3)


def noise(content: bytearray, draw: random.Random) -> None:
    """Inserts up to sixteen random bytes."""
    at = place(content, draw)
    content[at:at] = draw.randbytes(draw.randint(1, 16))


def place(content: bytearray, draw: random.Random) -> int:
    """Draws a position, as often among the first bytes, which hold sizes, as among all."""
    return draw.randrange(min(64, len(content)) if draw.random() < 0.5 and content else
                          max(1, len(content)))  # fmt: skip


CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip, number, number, number, cut, remove, repeat, noise,
)  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Applies a few CHANGES."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        draw.choice(CHANGES)(changed, draw)
    return bytes(changed)


# Texts that JSON values are replaced by, as they are.
TOKENS = (
    "null", "true", "false", "0", "-0", "1", "-1", "-5", "0.0", "-0.0", "1e-400", "1e400", "-1e400",
    "NaN", "Infinity", "-Infinity", "9223372036854775807", "9223372036854775808", "1e15", "1" * 400,
    "1.5", "4.0", "1000000", "65536", "1e-320", '""', '"a"', '"4"', '"\\ud800"', '"\\u0000"', "[]",
    "{}", "[8]", "[8,8]", "[8,8,8]", "[-8,8]", "[65536,65536]", "[[8],8]", '{"a":{"a":1}}',
    "[" * 3000 + "]" * 3000, '{"a":' * 2000 + "1" + "}" * 2000,
)  # fmt: skip


def damaged_json(value: dict[str, Any], draw: random.Random) -> bytes:
    """Replaces, drops, repeats and renames values of an object."""
    pairs = [(json.dumps(name), json.dumps(item)) for name, item in value.items()]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at, kind = draw.randrange(len(pairs)), draw.random()
        name, item = pairs[at]
        if kind < 0.7:
            pairs[at] = (name, draw.choice(TOKENS))
        elif kind < 0.8 and len(pairs) > 1:
            del pairs[at]
        elif kind < 0.9:
            pairs.append((name, draw.choice((item, *TOKENS))))
        else:
            pairs[at] = (draw.choice(('"x"', '""', '"\\ud800"', name.upper())), item)
    return ("{" + ", ".join(f"{name}: {item}" for name, item in pairs) + "}").encode()


def odd_tensor(tensor: torch.Tensor, draw: random.Random) -> Any:
    """Replaces a tensor by one of another shape, type, layout or content, or by something else."""
    odd: list[Callable[[], Any]] = [
        lambda: torch.tensor(1.0),
        lambda: tensor.new_zeros(()),
        lambda: tensor[:0] if tensor.ndim else tensor,
        lambda: tensor.flatten(),
        lambda: tensor.unsqueeze(0),
        lambda: tensor.transpose(0, -1) if tensor.ndim > 1 else tensor[..., None],
        lambda: tensor.double(),
        lambda: tensor.half(),
        lambda: tensor.to(torch.int64),
        lambda: tensor.to(torch.bool),
        lambda: tensor.to(torch.complex64),
        lambda: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor,
        lambda: torch.full_like(tensor, 1e38) if tensor.is_floating_point() else tensor,
        lambda: torch.zeros_like(tensor),
        lambda: -tensor.float(),
        lambda: torch.ones(1).expand(10**9),
        lambda: torch.zeros(1).expand(tensor.shape),
        lambda: torch.empty(tensor.shape, device="meta"),
        lambda: torch.zeros(2, 2).to_sparse(),
        _quantised,
        lambda: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor,
    ]
    return draw.choice(odd)()


def _quantised() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # on their way out
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


# What other values are replaced by.
VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, -5, 2**31, 2**63, 2**70, 0.5, float("nan"), float("inf"), -1e400, "", "x",
    "[", "null", b"x", [], [1], {}, {"a": 1}, {1: 2}, (), {1, 2},
)  # fmt: skip


def damaged_tree(value: Any, draw: random.Random) -> Any:
    """Copies nested dicts and lists, with one entry replaced, dropped, renamed or added."""
    if isinstance(value, dict) and value and draw.random() < 0.97:
        copy = dict(value)
        key, kind = draw.choice(list(copy)), draw.random()
        if kind < 0.8:
            copy[key] = damaged_tree(copy[key], draw)
        elif kind < 0.88:
            del copy[key]
        elif kind < 0.94:
            copy[draw.choice((f"{key}x", f"module.{key}", "", 7, None))] = copy.pop(key)
        else:
            copy[f"{key}.more"] = copy[key]
        return copy
    if isinstance(value, (list, tuple)) and value and draw.random() < 0.97:
        items = list(value)
        at, kind = draw.randrange(len(items)), draw.random()
        if kind < 0.9:
            items[at] = damaged_tree(items[at], draw)
        elif kind < 0.95:
            del items[at]
        else:
            items.append(items[at])
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, torch.Tensor) and draw.random() < 0.9:
        return odd_tensor(value, draw)
    if isinstance(value, str) and value.startswith("{") and draw.random() < 0.9:
        return damaged_json(json.loads(value), draw).decode()
    return draw.choice(VALUES)


def damaged_zip(content: bytes, draw: random.Random) -> bytes:
    """Damages one record of an archive, its name or its compression; checksums fit."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    chosen, kind, file = draw.randrange(len(records)), draw.random(), io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for at, (name, data) in enumerate(records):
            method = zipfile.ZIP_STORED
            if at == chosen:
                if kind < 0.6:
                    data = damaged(data, draw)
                elif kind < 0.7:
                    method = draw.choice(
                        (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
                    )
                elif kind < 0.8:
                    name = draw.choice((name[1:], f"{name}x", f"../{name}", "ä", name.upper()))
                elif kind < 0.9:
                    continue
                else:
                    data = draw.choice((b"", data[: len(data) // 2], data * 2, bytes(len(data))))
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return file.getvalue()


def odd_array(array: np.ndarray[Any, Any], draw: random.Random) -> Any:
    """Replaces an array by one of another shape, type or content."""
    array = np.asarray(array)  # bytes or text, if it was damaged before
    odd: list[Callable[[], Any]] = [
        lambda: np.flip(array.T),
        lambda: array[:-1] if array.ndim else np.array([array]),
        lambda: array[..., None],
        lambda: np.zeros(0),
        lambda: np.array(None),
        lambda: np.array([None] * 4),
        lambda: array.astype(complex) if array.dtype.kind in "fiu" else array,
        lambda: array.astype(np.float16) if array.dtype.kind in "fiu" else array,
        lambda: array.astype(np.longdouble) if array.dtype.kind in "fiu" else array,
        lambda: array.astype(">f4") if array.dtype.kind in "fiu" else array,
        lambda: np.full(array.shape, draw.choice((np.nan, np.inf, 1e300, 1e99, -1e99, -1, 1e-300))),
        lambda: np.asfortranarray(np.full(array.shape, 2**63, np.uint64)),
        lambda: np.str_("x" * draw.choice((0, 1, 64, 3000))),
        lambda: np.bytes_(b"x"),
        lambda: np.zeros(array.shape, [("a", "f8"), ("b", "U3")]),
        lambda: np.datetime64("2020-01-01"),
        lambda: array + np.random.default_rng(draw.randrange(100)).normal(size=array.shape)
        if array.dtype.kind == "f" else array,
    ]  # fmt: skip
    return draw.choice(odd)()
