"""How the commands fail: one line that says what to do, and the right exit code."""

import importlib
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ncsn_fast.cli import command
from ncsn_fast.cli.command import UsageError


@pytest.fixture
def in_folder(tiny_folder, monkeypatch) -> None:
    """Works where ./model is the tiny model."""
    monkeypatch.chdir(tiny_folder.parent)


USAGE = {
    "unknown option": ("train --n-sigmaz 3", "Unrecognized options: --n-sigmaz"),
    "misspelt option": ("train --max-minuets 3", "3 (did you mean --max-minutes?). See"),
    "two of them": ("train --nmae a --ngff 8", "(did you mean --name and --ngf?). See"),
    "of a subcommand": ("edit inpaint --modle digits", "(did you mean --model?). See"),
    "misspelt command": ("edit inpant", "inpant (did you mean 'inpaint'?). See"),
    "misspelt choice": ("sample --method dpm", "'--method' (did you mean 'dpmpp'?). Expected one"),
    "misspelt config": ("train --config digit", "got 'digit' (did you mean 'digits'?)"),
    "nothing like it": ("sample --quux 3", "Unrecognized options: --quux, 3. See"),
    "an option elsewhere": ("edit denoise --method ald", "edit denoise). See"),
    "no number": ("train --ngf wide", "--ngf must be an integer; got 'wide'"),
    "no rate at all": ("train --lr fast", "--lr must be a number; got 'fast'"),
    "half an image": ("sample --batch-size 1.5", "--batch-size must be an integer; got '1.5'"),
    "no bend": ("sample --rho steep", "--rho must be a number; got 'steep'"),
    "no type": ("sample --dtype int8", "Expected one of bf16, fp16, fp32, tf32."),
    "no choice": ("train --arch vgg", "invalid choice 'vgg' for argument '--arch'"),
    "no config": ("train --config cifar", "--config must be one of digits, mnist, cifar10"),
    "config of nothing": ("train --config", "expected one argument"),
    "no data": ("train --config cifar10", "--config cifar10 needs images: --data"),
    "no steps": ("train --steps 0", "steps must be at least 1, and finite; got 0"),
    "negative": ("train --warmup -1", "warmup must be at least 0"),
    "nan": ("train --grad-clip nan", "grad_clip must be at least 0, and finite; got nan"),
    "no rate": ("train --lr 0", "lr must be positive"),
    "large rate": ("train --lr 1e38", "lr must be at most 1e+30; got 1e+38"),
    "decay of 1": ("train --ema 1", "ema must be at least 0 and below 1"),
    "wide seed": ("train --seed 4294967296", "seed must be at least 0 and below"),
    "odd size": ("train --image-size 9", "image_size must be multiples of 2 for ncsnv2; got 9"),
    "rising": ("train --sigma-begin 0.001", "sigma_begin must be above sigma_end=0.01"),
    "path as name": ("train --name a/b", "name must be a plain folder name"),
    "grey": ("train --channels 3", "the digits are grey"),
    "no sample": ("sample --n 0", "--n must be at least 1; got 0"),
    "no engine": ("sample --engine warp", "invalid choice 'warp' for argument '--engine'"),
    "no method": ("evaluate --method nope", "invalid choice 'nope' for argument '--method'"),
    "seed of 33 bits": ("sample --seed 4294967296", "--seed must be in [0, 2**32)"),
    "before the first": ("edit interpolate --start -1", "--start must be in [0, 2**32)"),
    "no frames": ("edit interpolate --frames 0", "--frames must be at least 1; got 0"),
    "no images": ("edit denoise --n -3", "--n must be at least 1; got -3"),
    "n of 67 bits": ("sample --n 99999999999999999999", "--n must be at most 4294967296"),
    "n of 33 bits": ("edit inpaint --n 4294967297", "--n must be at most 4294967296"),
    "n of 33 bits, too": ("evaluate --n 4294967297", "--n must be at most 4294967296"),
    "batch of 67 bits": (
        "sample --batch-size 99999999999999999999",
        "--batch-size must be at most",
    ),
    "no columns": ("sample --columns 0", "--columns must be at least 1; got 0"),
    "no png": ("sample --out grid.jpg", "--out must end in .png"),
    "no png either": ("evaluate --neighbours a", "--neighbours must end in .png"),
    "option of none": ("edit denoise --method ald", "misplaced options: --method"),
    "no edit": ("edit", "Expected one of {inpaint, colourise, super-resolve,"),
    "unknown edit": ("edit paint", "paint"),
    "one argument": ("convert x.pth", "FOLDER"),
}


@pytest.mark.parametrize("unicode", [True, False], ids=["unicode", "ascii"])
@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(case, unicode, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8" if unicode else "ascii")
    )
    line, text = USAGE[case]
    name, *arguments = line.split()
    module = importlib.import_module(f"ncsn_fast.{name}")
    assert command.run(lambda: module.main(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert text in said


FAILURES = {
    "no model": ("sample --model nowhere", "nowhere does not exist"),
    "misspelt model": ("sample --model digit", "digit does not exist (did you mean 'digits'?); a"),
    "misspelt extractor": ("tune --model model --extractor mnits", "(did you mean 'mnist'?): it"),
    "no data": ("train --data nowhere", "nowhere does not exist"),
    "no source": ("convert nowhere.pth out", "nowhere.pth does not exist"),
    "no pth": ("convert words.txt out", "words.txt"),
    "no engine": ("sample --model model --engine trt", "engine 'trt' (TensorRT 10.16 or 11.4, our"),
    "no mask": ("edit inpaint --model model --mask middle", "--mask must be left, right"),
    "no picture": ("edit denoise --model model --images words.png", "words.png"),
    "no folder": ("sample --model model --quiet --n 1 --out words.txt/a.png", "cannot write"),
}


# Of two faults, the one that needs no model is found first: nowhere is no model.
BEFORE_THE_MODEL = {
    "images": ("edit sdedit --images lost.png", "lost.png does not exist"),
    "one image": ("edit denoise --images words.png", "cannot decode words.png: not a PNG"),
    "no data set": ("edit deblur --images words.txt", "cannot decode words.txt: not a PNG"),
    "mask": ("edit inpaint --mask lefft", "no such file) (did you mean 'left'?)"),
    "mask's file": ("edit inpaint --mask words.png", "cannot decode words.png: not a PNG"),
    "classifier": ("edit guide --classifier mine_not:f", "--classifier mine_not:f: No module"),
    "extractor": ("evaluate --extractor mnits --reference digits", "(did you mean 'mnist'?): it"),
    "reference": ("evaluate --extractor digits --reference lost", "lost does not exist; data is"),
    "bits of nothing": ("evaluate --bpd --data lost", "lost does not exist; data is"),
    "references": ("tune --data lost --out t", "lost does not exist; data is"),
    "tuner's extractor": ("tune --extractor mnits --out t", "(did you mean 'mnist'?): it"),
    "output": ("sample --out words.txt/a.png", "words.txt is not a folder"),
    "figures": ("evaluate --out words.txt/a.json", "words.txt is not a folder"),
    "edited": ("edit inpaint --out words.txt/a.png", "words.txt is not a folder"),
    "exported": ("export --out words.txt/a.onnx", "words.txt is not a folder"),
    "converted": ("convert nowhere words.txt/a", "words.txt is not a folder"),
    "tuned": ("tune --out words.txt/a", "words.txt is not a folder"),
}


@pytest.mark.parametrize("case", BEFORE_THE_MODEL)
def test_faults_that_need_no_model_are_found_before_it_is_read(case, in_folder, capsys):
    Path("words.txt").write_text("no model")
    Path("words.png").write_text("no picture")
    line, text = BEFORE_THE_MODEL[case]
    name, *arguments = line.split()
    arguments += ["--model", "nowhere"] * (name != "convert")
    module = importlib.import_module(f"ncsn_fast.{name}")
    assert command.run(lambda: module.main(arguments)) == 1
    assert text in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("case", FAILURES)
def test_failures(case, in_folder, capsys):
    Path("words.txt").write_text("no model")
    Path("words.png").write_text("no picture")
    line, text = FAILURES[case]
    name, *arguments = line.split()
    module = importlib.import_module(f"ncsn_fast.{name}")
    assert command.run(lambda: module.main(arguments)) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said
    assert text in said.splitlines()[-1]


def test_warnings_are_told_from_other_lines(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def main() -> int:
        logging.getLogger("ncsn_fast.train").info("training")
        logging.getLogger("ncsn_fast.train").warning("it exists")
        return 0

    assert command.run(main) == 0
    assert capsys.readouterr().err == "training\nwarning: it exists\n"


def test_exit_codes_of_errors(capsys):
    def stop(error: BaseException):
        def main() -> int:
            raise error

        return command.run(main)

    assert stop(UsageError("no such thing")) == 2
    assert stop(KeyboardInterrupt()) == 130
    for error in (OSError(28, "No space left on device"), MemoryError(), RuntimeError("broke")):
        assert stop(error) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "error: no such thing", "interrupted", "error: [Errno 28] No space left on device",
        "error: MemoryError", "error: broke",
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        stop(ZeroDivisionError())


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["-m", "ncsn_fast.sample", "--model", "nowhere"], 1, "nowhere does not exist"),
        (["-m", "ncsn_fast", "train", "--bogus"], 2, "Unrecognized options: --bogus"),
    ],
)
def test_commands_as_processes(tmp_path, words, code, text):
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert text in done.stderr
    assert list(tmp_path.iterdir()) == []
