"""`python -m ncsn_fast.tune`, on the tiny model."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import tiny

import ncsn_fast
from ncsn_fast.checkpoints.model_folder import TABLE_NAME
from ncsn_fast.cli import command
from ncsn_fast.training import tuning

tune = importlib.import_module("ncsn_fast.tune")
QUICK = ["--nfe", "2", "--candidates", "0", "--samples", "2", "--references", "2", "--quiet",
         "--engine", "eager", "--batch-size", "2"]  # fmt: skip


def run(*words: str) -> int:
    return command.run(lambda: tune.main([*map(str, words)]))


@pytest.fixture
def folder(tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    return tiny_folder


def test_a_search_without_a_gain(folder, capsys, caplog):
    assert run("--model", "model", *QUICK) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert "references: 2 samples by ald, of the model itself" in caplog.text
    assert not (folder / TABLE_NAME).exists()
    assert sorted(p.name for p in Path("tune-model-2").iterdir()) == [
        "references.safetensors", "search.json",
    ]  # fmt: skip
    assert run("--model", "model", *QUICK, "--samples", "3") == 1
    assert "another samples: choose another --state" in capsys.readouterr().err


def test_a_table_is_written_and_used(folder, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "gain_of", lambda before, after: (1.0, 0.1))
    assert run("--model", "model", *QUICK, "--state", "state") == 0
    assert f"written to {Path('model') / TABLE_NAME}" in capsys.readouterr().out
    report = ncsn_fast.Sampler("model", engine="eager")
    report.sample(1, method="fast", progress=False)
    assert report.report.nfe == 2
    settings = ["--method", "fast", "--n", "1", "--out-dir", "samples", "--quiet"]
    sample = importlib.import_module("ncsn_fast.sample")
    assert command.run(lambda: sample.main(["--model", "model", *settings])) == 0
    (folder / TABLE_NAME).unlink()
    assert command.run(lambda: sample.main(["--model", "model", *settings])) == 1
    assert "holds samples drawn with another table" in capsys.readouterr().err


def test_a_search_starts_from_a_model_with_a_table(folder, capsys):
    assert run("--model", "model", *QUICK, "--initial", "digits") == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert run("--model", "model", *QUICK, "--initial", "model", "--state", "other") == 1
    assert "--initial model has no tuned table; leave it out" in capsys.readouterr().err


def test_models_that_cannot_get_a_table_need_out(folder, capsys):
    run_folder = Path("run") / "checkpoints"
    run_folder.mkdir(parents=True)
    (run_folder / "step_1.pt").touch()
    for model in ("run", "digits"):
        assert run("--model", model, *QUICK) == 1
        assert "name a folder to write with out (--out)" in capsys.readouterr().err
    assert run("--model", "model", *QUICK, "--out", "run") == 1
    assert "run is a training run; write the model folder elsewhere" in capsys.readouterr().err
    shutil.copy("model/config.json", "file")
    assert run("--model", "model", *QUICK, "--out", "file") == 1
    assert "file is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--nfe", "1"], "--nfe must be at least 2; got 1"),
        (["--budget", "-1"], "--budget must be minutes, below 1000000; got -1.0"),
        (["--loss", "kid"], "--loss kid needs an --extractor"),
        (["--seed", "40000"], "--seed must be in [0, 32767)"),
        (["--background", "black"], "--background is for --data"),
        (["--candidates", "-1"], "--candidates must be at least 0"),
    ],
)
def test_usage_errors(words, text, capsys):
    assert run(*words) == 2
    assert text in capsys.readouterr().err


def test_without_cma(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cma", None)
    assert run("--model", "model", *QUICK) == 1
    assert "pip install 'ncsn_fast[tune]'" in capsys.readouterr().err


def test_the_function_is_where_the_command_is(monkeypatch):
    """Importing the command makes it the attribute of the package, and it can be called."""
    monkeypatch.setattr(tune, "tune", lambda model, **options: (model, options))
    assert sys.modules["ncsn_fast.tune"]("model", nfe=3) == ("model", {"nfe": 3})
    assert callable(ncsn_fast.tune)
    assert "tune" in ncsn_fast.__all__
    assert tiny.model().tuned is None
