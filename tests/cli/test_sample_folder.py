"""Folders of samples: what counts as drawn, what they are made with, and what is read again."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

import ncsn_fast
from ncsn_fast import SamplingError, sample
from ncsn_fast.cli import sample_folder
from ncsn_fast.cli.sample_folder import (
    SETTINGS_NAME,
    claim_folder,
    is_whole,
    read_files,
    read_settings,
    write_files,
)
from ncsn_fast.cli.sample_options import SampleOptions
from ncsn_fast.data.decode import DataError
from ncsn_fast.data.images import sample_path, save_png

INDICES = [0, 1, 1000]
DAMAGES = (
    "empty", "half", "zeros", "end of zeros", "another size", "in colour", "pipe", "missing",
)  # fmt: skip
REQUEST = "--model model --engine eager --method euler --steps 2 --quiet --out-dir out"


def words(n: int, *more: str) -> list[str]:
    """A request of n samples, cheap ones."""
    return [*REQUEST.split(), "--n", str(n), *more]


@pytest.fixture(autouse=True)
def folder(tiny_folder, monkeypatch) -> Path:
    """Works where ./model is the tiny model."""
    monkeypatch.chdir(tiny_folder.parent)
    return Path("out")


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "zeros":  # what some file systems leave after a power failure
        path.write_bytes(bytes(len(content)))
    elif how == "end of zeros":
        path.write_bytes(content[:-40] + bytes(40))
    elif how == "another size":
        Image.open(path).resize((9, 8)).save(path)
    elif how == "in colour":
        Image.open(path).convert("RGB").save(path)
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.unlink()


def test_what_is_not_whole_is_drawn_again(folder, capsys, caplog):
    assert sample.main(words(9)) == 0
    drawn = {path: path.read_bytes() for path in folder.rglob("*.png")}
    assert len(drawn) == 9
    assert all(is_whole(path, (1, 8, 8)) for path in drawn)
    for i, how in enumerate(DAMAGES):
        path = sample_path(folder, i)
        damage(path, how)
        assert not is_whole(path, (1, 8, 8)), how
    capsys.readouterr()
    assert sample.main(words(9)) == 0
    assert capsys.readouterr().out == "out: 8 samples written, 1 were there\n"
    assert "drawn again, as incomplete or of another size: 7 of out" in caplog.text
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == drawn


def test_windows_give_the_files_of_one(folder, monkeypatch, capsys):
    assert sample.main([*words(9), "--out-dir", "whole"]) == 0
    monkeypatch.setattr(sample_folder, "WINDOW", 4)
    sample_path(folder, 3).parent.mkdir(parents=True)
    for i in (2, 7):
        shutil.copy(sample_path(Path("whole"), i), sample_path(folder, i))
    (folder / "000000" / ".000003.png.x1_.tmp").write_bytes(b"half a pict")
    assert sample.main(words(9)) == 0
    assert "out: 7 samples written, 2 were there\n" in capsys.readouterr().out
    contents = [
        {p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        for top in (Path("whole"), folder)
    ]
    assert contents[0] == contents[1]


def test_a_request_of_2_to_the_32_takes_the_memory_of_a_window(folder, monkeypatch):
    """Nothing as long as the request is built before the first samples are drawn."""
    monkeypatch.setattr(sample_folder, "WINDOW", 100)
    asked = []

    def stop(self, samples, **options):
        asked.append(samples)
        raise SamplingError("the work would start here")

    monkeypatch.setattr(ncsn_fast.Sampler, "stream", stop)
    sampler = ncsn_fast.Sampler("model", engine="eager", batch_size=4)
    sampler.engine_for(1)
    options = SampleOptions(model="model", n=2**32 - 8, start=8)
    for n in (150, 2**32 - 8):
        tracemalloc.start()
        with pytest.raises(SamplingError):
            write_files(sampler, options, folder, range(n))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6, n
    assert [part.tolist() for part in asked] == 2 * [list(range(8, 108))]


def test_whole_colour_pictures(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (5, 7)).save(path)
    assert is_whole(path, (3, 7, 5))
    assert not is_whole(path, (3, 5, 7))
    assert not is_whole(path, (1, 7, 5))


@pytest.mark.parametrize("content", [
    None, b"", b"{", b"[1]", b"\xff", b"[" * 10**5, b'{"a": 1, "a": 2}',
])  # fmt: skip
def test_settings_that_say_nothing(folder, content):
    folder.mkdir()
    path = folder / SETTINGS_NAME
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"settings.json does not say what .* take a new --out-dir"
    ):
        claim_folder(folder, {"seed": 1}, "samples drawn")


def test_settings_may_be_infinite(folder):
    claim_folder(folder, {"s_max": float("inf")}, "samples drawn")
    claim_folder(folder, {"s_max": float("inf")}, "samples drawn")
    assert read_settings(folder) == {"s_max": float("inf")}
    with pytest.raises(ValueError, match="another s_max"):
        claim_folder(folder, {"s_max": 1.0}, "samples drawn")


def test_settings_of_a_killed_writer_are_cleared(folder):
    claim_folder(folder, {"seed": 1}, "samples drawn")
    (folder / f".{SETTINGS_NAME}.x1_y.tmp").write_text("half")
    claim_folder(folder, {"seed": 1}, "samples drawn")
    assert os.listdir(folder) == [SETTINGS_NAME]


@pytest.mark.slow
def test_two_equal_commands_at_once(folder):
    """They draw the same files at the same moments; neither fails, and nothing is left over."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "ncsn_fast.sample", *words(400, "--batch-size", "1")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {SETTINGS_NAME, *(f"000000/{i:06d}.png" for i in range(400))}
    assert all(is_whole(sample_path(folder, i), (1, 8, 8)) for i in range(400))
    assert json.loads((folder / SETTINGS_NAME).read_text())["method"] == "euler"


@pytest.fixture
def drawn(tmp_path):
    for i in INDICES:
        save_png(np.full((8, 8, 3), i % 255, np.uint8), sample_path(tmp_path, i))
    return tmp_path


def test_samples_come_in_batches(drawn):
    parts = list(read_files(drawn, INDICES, (3, 8, 8), size=2))
    assert [len(part) for part in parts] == [2, 1]
    x = torch.cat(parts)
    assert (x.dtype, x.shape) == (torch.float32, (3, 3, 8, 8))
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 1000 % 255]


BROKEN = {
    "empty": b"",
    "text": b"no image",
    "size": None,
    "bomb": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\0\0\0\0\x8b\xa1\x01\xb6",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_samples_are_named_with_a_remedy(drawn, case):
    path = sample_path(drawn, 1)
    if BROKEN[case] is None:
        Image.new("RGB", (9, 8)).save(path)
    else:
        path.write_bytes(BROKEN[case])
    with pytest.raises(DataError) as raised:
        list(read_files(drawn, INDICES, (3, 8, 8)))
    assert str(path) in str(raised.value)
    if case != "bomb":
        assert str(raised.value).endswith("Delete it, and repeat the command: it is drawn again.")


def test_missing_samples_are_named(drawn):
    with pytest.raises(FileNotFoundError, match=r"000002\.png is missing, though all samples"):
        list(read_files(drawn, [2], (3, 8, 8)))
