"""Random arguments for every command: an exit code and one line of error, never a traceback."""

import importlib
import random
import re
from pathlib import Path

import pytest
import tiny
from PIL import Image

from ncsn_fast.cli import command
from ncsn_fast.inference import runner
from ncsn_fast.inference.runner import SamplingError

ROUNDS = (6, pytest.param(60, marks=pytest.mark.slow))  # of every command
VALUES = [
    "", " ", "-", "--", "-1", "0", "1", "2", "1.5", "1e-3", "nan", "inf", "-inf", "1e400", "1e-400",
    "99999999999999999999", "-99999999999999999999", "0x10", "1_0", "٣", "🙂", "None", "True", "{}",
    "[1]", "a", "a b", "a:b", "os:getcwd", "a,b", "1,1", "8,8", "0,0", "1:2:3", "3:2:1", "0/0",
    "0/2", "..", ".", "/", "~nobody", "model", "five", "digits", "hf:",
    "file.txt", "picture.png",
    "folder.png", "new.png", "new.json", "new.npz", "new.onnx", "x" * 300, "cuda", "cuda:99", "cpu",
    "meta", "fp16", "cas", "pc", "ode", "langevin", "karras", "2" * 5000,
]  # fmt: skip
# What comes first: cheap settings, so that a command that goes through is done in a moment.
CHEAP = "--model model --engine eager --quiet"
EDITS = (
    "inpaint",
    "colourise",
    "super-resolve",
    "deblur",
    "sdedit",
    "guide",
    "interpolate",
    "denoise",
)
STARTS = {
    "sample": f"{CHEAP} --n 1",
    **{f"edit {name}": CHEAP for name in EDITS},
    "evaluate": f"{CHEAP} --n 10",
    "evaluate --bpd": "--model model --quiet --n 2",
    "train": " ".join(tiny.arguments()),
    "train --config toy": "--steps 1 --width 2 --n 2",
    "export": "--model model --out m.onnx",
    "convert": "model out",
    "cache list": "--folder cache",
    "cache clear": "--folder cache",
    "tune": "--model model --quiet",
    "doctor": "",
}  # fmt: skip


@pytest.fixture
def in_folder(tiny_folder, monkeypatch, tmp_path) -> None:
    """Works where files of many kinds lie; nothing is sampled, trained, exported or measured."""
    monkeypatch.chdir(tiny_folder.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    tiny.model(channels=5).save_pretrained("five")
    Path("file.txt").write_text("a file")
    Image.new("L", (9, 7), 77).save("picture.png")
    Path("folder.png").mkdir()

    def stop(*args, **options):
        raise SamplingError("the work would start here")

    monkeypatch.setattr(runner, "run", stop)
    for module, name in (
        ("train", "fit"), ("evaluate", "measure"), ("export", "export_onnx"), ("doctor", "facts"),
        ("tune", "tune"),
    ):  # fmt: skip
        monkeypatch.setattr(importlib.import_module(f"ncsn_fast.{module}"), name, stop)


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("name", STARTS)
def test_any_arguments(name, rounds, in_folder, capsys):
    chance, words = random.Random(f"{name} {rounds}"), name.split()
    module = importlib.import_module(f"ncsn_fast.{words[0]}")
    with pytest.raises(SystemExit):
        module.main([*words[1:], "--help"])
    listed = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    options = sorted(listed | {"--nothing"})
    assert "--help" in listed
    codes = set()
    for _ in range(rounds):
        arguments = [*words[1:], *STARTS[name].split()]
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            arguments += [
                chance.choice(options),
                *chance.sample(VALUES, chance.choice((0, 1, 1, 1, 2))),
            ]
        try:
            code = command.run(lambda arguments=arguments: module.main(arguments))
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            raise AssertionError(f"ncsn_fast.{words[0]} {arguments}: {error!r}") from error
        said = capsys.readouterr().err
        assert code in (0, 1, 2), arguments
        assert code == 0 or said.splitlines()[-1].startswith("error: "), arguments
        codes.add(code)
    assert codes & {1, 2}
