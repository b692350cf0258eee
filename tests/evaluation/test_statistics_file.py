"""Files of reference statistics that are damaged, or made to harm."""

import os
import tracemalloc
import zipfile
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ncsn_fast.evaluation.features import Extractor
from ncsn_fast.evaluation.metrics import Statistics, statistics_distance
from ncsn_fast.evaluation.statistics_file import load_statistics

EXTRACTOR = cast(Extractor, SimpleNamespace(name="corner", num_features=4, sha256="a" * 64))
GOOD: dict[str, Any] = {"mu": np.zeros(4), "sigma": np.eye(4)}


@pytest.mark.parametrize(("change", "text"), [
    ({"n": np.array([1, 2])}, r"n must be real numbers of shape \(\); got .* of shape \(2,\)"),
    ({"n": np.inf}, "n must be a number of images; got inf"),
    ({"n": np.nan}, "n must be a number of images; got nan"),
    ({"n": 1.5}, "n must be a number of images; got 1.5"),
    ({"n": -3}, "n must be a number of images; got -3"),
    ({"n": 1j}, "n must be real numbers of shape .*; got complex128"),
    ({"n": np.array(None)}, "n must be real numbers of shape .*; got object"),
    ({"n": np.str_("many")}, "n must be real numbers"),
    ({"mu": np.zeros(4, dtype=complex)}, "mu must be real numbers"),
    ({"mu": np.array([None] * 4)}, "mu must be real numbers .*; got object"),
    ({"mu": np.zeros(4, dtype="V8")}, "mu must be real numbers"),
    ({"sigma": np.zeros((4, 4), dtype=[("a", "f8")])}, "sigma must be real numbers"),
    ({"mu": np.full(4, 1e200)}, "holds numbers beyond 1e.100"),
    ({"sigma": 1e300 * np.eye(4)}, "holds numbers beyond 1e.100"),
    ({"sigma": np.full((4, 4), np.inf)}, "NaN or infinite"),
    ({"extractor_sha256": np.array(["a", "b"])}, "extractor_sha256 must be text of shape"),
    ({"extractor_sha256": np.str_("x" * 2000)}, "do not fit its shape and type"),
])  # fmt: skip
def test_entries_of_other_kinds(change, text, tmp_path):
    np.savez(tmp_path / "s.npz", **{**GOOD, **change})
    with pytest.raises(ValueError, match=text):
        load_statistics(tmp_path / "s.npz", EXTRACTOR)


@pytest.mark.parametrize(("n", "expected"), [(7, 7), (np.float32(7), 7), (None, 0), (2**40, 2**40)])
def test_numbers_of_images(n, expected, tmp_path):
    np.savez(tmp_path / "s.npz", **(GOOD if n is None else {**GOOD, "n": n}))
    assert load_statistics(tmp_path / "s.npz", EXTRACTOR).n == expected


def npy(header: str, version: int = 1, length: int | None = None) -> bytes:
    """The start of an .npy entry, with a header that says anything."""
    size = (len(header) if length is None else length).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode()


SHAPED = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}\n"
BOMBS = {
    "an entry that nobody needs": ("other.npy", None),
    "a shape that is none of ours": ("sigma.npy", npy(SHAPED.format("<f8", "(200000, 200000)"))),
    "more bytes than its shape": ("mu.npy", npy(SHAPED.format("<f8", "(4,)"))),
    "a header without end": ("mu.npy", npy("", 2, 2**30)),
    "a text of any length": ("extractor_sha256.npy", npy(SHAPED.format("<U4000000", "()"))),
    "a header that is code": ("mu.npy", npy("__import__('os').mkdir('here')")),
    "a header nested deeply": ("mu.npy", npy("(" * 3000)),
    "another version": ("mu.npy", npy(SHAPED.format("<f8", "(4,)"), 3)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_is_declared_takes_no_memory(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, start = BOMBS[kind]
    np.savez(tmp_path / "s.npz", **{k: v for k, v in GOOD.items() if f"{k}.npy" != name})
    with zipfile.ZipFile(tmp_path / "s.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, (start or b"") + bytes(2**24))
    assert (tmp_path / "s.npz").stat().st_size < 2**16
    tracemalloc.start()
    if start is None:
        load_statistics(tmp_path / "s.npz", EXTRACTOR)
    else:
        with pytest.raises(
            ValueError, match=r"cannot read .*s\.npz as an npz file of mu and sigma"
        ):
            load_statistics(tmp_path / "s.npz", EXTRACTOR)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert os.listdir(tmp_path) == ["s.npz"]


def test_files_that_are_no_archives(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "words.npz").write_text("words")
    for name, text in (
        ("pipe", "is a pipe or device"), ("words", "not a zip"), ("nowhere", "No such file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"cannot read .*{name}\.npz as an npz file.*{text}"):
            load_statistics(tmp_path / f"{name}.npz", EXTRACTOR)


def test_a_distance_that_cannot_be_computed():
    broken = Statistics(np.zeros(2), np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match=r"no Fréchet distance: .* are the features finite"):
        statistics_distance(broken, broken)
