"""What commands write: refused before the work where it cannot be written, kept where it fails."""

import importlib
import re
from pathlib import Path

import pytest
import tiny

import ncsn_fast
from ncsn_fast import evaluate, sample
from ncsn_fast.cli import command, outputs
from ncsn_fast.inference import runner


@pytest.fixture
def in_folder(tiny_folder, monkeypatch) -> None:
    """Works where ./model is the tiny model, ./five one of five channels, and nothing may run."""
    monkeypatch.chdir(tiny_folder.parent)
    tiny.model(channels=5).save_pretrained("five")
    Path("file.txt").write_text("a file")
    Path("folder.png").mkdir()
    Path("folder.json").mkdir()


def never(*args, **kwargs):
    raise AssertionError("the work has started")


def run(line: str, capsys) -> tuple[int, str]:
    name, *arguments = line.split()
    module = importlib.import_module(f"ncsn_fast.{name}")
    code = command.run(lambda: module.main(arguments))
    return code, capsys.readouterr().err.splitlines()[-1]


LONG = "x" * 300
REFUSED = {
    "sample --out file.txt/g.png": "cannot write --out file.txt/g.png: .*file.txt is not a folder",
    "sample --out folder.png": "cannot write --out folder.png: it is a folder",
    "sample --out-dir file.txt": "--out-dir file.txt: .*file.txt is not a folder",
    "sample --out /proc/ncsn_fast/g.png": r"--out /proc/.* takes no file \(.+\); choose another",
    f"sample --out {LONG}.png": "File name too long",
    "sample --columns 100000000": "a grid of 64 images in 100000000 columns would have 5000",
    "sample --n 40000000": "more than 536870912: take fewer images or columns, or one file each",
    "sample --model five": "5 channels, and pictures are grey or RGB",
    "sample --model five --out-dir out": "5 channels, and pictures are grey or RGB",
    "edit inpaint --out file.txt/g.png": "cannot write --out file.txt/g.png",
    "edit denoise --out folder.png": "cannot write --out folder.png: it is a folder",
    "edit interpolate --frames 100000000": "a grid of 400000000 images",
    "edit interpolate --model five": "5 channels, and pictures are grey or RGB",
    "edit guide --classifier os:getcwd --n 90000000": "a grid of 180000000 images",
    "evaluate --out folder.json": "cannot write --out folder.json: it is a folder",
    "evaluate --grid file.txt/g.png": "cannot write --grid file.txt/g.png",
    "evaluate --out-dir file.txt": "cannot write --out-dir file.txt",
    "evaluate --extractor digits --model five --grid g.png": "5 channels, and pictures are grey",
    "export --out file.txt/m.onnx": "cannot write --out file.txt/m.onnx",
    "export --out folder.png": "cannot write --out folder.png: it is a folder",
    "convert model file.txt": "cannot write FOLDER file.txt: .*file.txt is not a folder",
    "train --runs file.txt": "cannot write --runs file.txt/digits: .*file.txt is not a folder",
    "train --config toy --runs file.txt": "cannot write --runs file.txt/toy",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_before_the_work(line, in_folder, capsys, monkeypatch):
    monkeypatch.setattr(runner, "run", never)
    monkeypatch.setattr(importlib.import_module("ncsn_fast.export"), "export_onnx", never)
    monkeypatch.setattr(importlib.import_module("ncsn_fast.train").datasets, "open_images", never)
    before = sorted(Path().rglob("*"))
    models = line.split()[0] in ("sample", "edit", "evaluate", "export") and "--model" not in line
    code, said = run(f"{line} --model model" if models else line, capsys)
    assert code == 1
    assert re.search(REFUSED[line], said), said
    assert sorted(Path().rglob("*")) == before


def test_nothing_is_left_by_the_check(tmp_path):
    outputs.check_output("--out", tmp_path / "a" / "b" / "g.png")
    outputs.check_output_folder("--out-dir", tmp_path / "a")
    outputs.check_output("--out", None)
    assert not list(tmp_path.iterdir())


def breaks_after(monkeypatch, owner, name: str, path: Path) -> None:
    """Lets a function, when it is done, make a folder where a result is to be written."""
    done = getattr(owner, name)

    def then(*args, **kwargs):
        result = done(*args, **kwargs)
        path.mkdir()
        return result

    monkeypatch.setattr(owner, name, then)


def kept(said: str) -> Path:
    found = re.search(r"The result is not lost: it is in (\S+); move it\.", said)
    assert found, said
    return Path(found[1])


def test_a_grid_that_cannot_be_written_is_kept(in_folder, capsys, monkeypatch):
    options = "--model model --engine eager --quiet --n 2"
    assert sample.main([*options.split(), "--out", "good.png"]) == 0
    breaks_after(monkeypatch, ncsn_fast.Sampler, "sample", Path("g.png"))
    code, said = run(f"sample {options} --out g.png", capsys)
    assert code == 1
    assert said.startswith("error: cannot write g.png: Is a directory")
    assert kept(said).name == "g.png"
    assert kept(said).read_bytes() == Path("good.png").read_bytes()


def test_figures_are_kept(in_folder, capsys, monkeypatch):
    breaks_after(monkeypatch, evaluate, "digit_figures", Path("f.json"))
    options = "--model model --engine eager --quiet --n 12"
    code, said = run(f"evaluate {options} --out f.json", capsys)
    assert code == 1
    assert '"figures"' in kept(said).read_text()
