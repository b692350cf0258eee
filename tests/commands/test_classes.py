"""The commands with a network that takes classes: --labels and --guidance."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import unets
from PIL import Image

import ncsn_fast
from ncsn_fast import edit, evaluate, sample
from ncsn_fast.cli.command import UsageError
from ncsn_fast.cli.options import parse_labels
from ncsn_fast.cli.sample_folder import SETTINGS_NAME
from ncsn_fast.data.images import make_grid, sample_path, to_uint8

EDIT = ["--model", "model", "--engine", "eager", "--quiet", "--batch-size", "2"]
REQUEST = [*EDIT, "--method", "euler", "--steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of three classes in ./model; tests do not change it."""
    folder = tmp_path_factory.mktemp("classes")
    unets.model("edm-ddpmpp").save_pretrained(folder / "model")
    return folder


@pytest.fixture
def of(folder, tmp_path, monkeypatch) -> ncsn_fast.ScoreModel:
    (tmp_path / "model").symlink_to(folder / "model")
    monkeypatch.chdir(tmp_path)
    return ncsn_fast.load("model")


def drawn(of, n, start=0, **call):
    sampler = ncsn_fast.Sampler(of, engine="eager", batch_size=2)
    return sampler.sample(n, start=start, method="euler", steps=2, progress=False, **call)


def test_a_sample_has_the_class_of_its_index(of):
    words = ["--n", "5", "--start", "4", "--labels", "0,2", "--guidance", "1.5", "--out", "g.png"]
    assert sample.main([*REQUEST, *words]) == 0
    expected = drawn(of, 5, 4, labels=[0, 2, 0, 2, 0], guidance=1.5)
    assert np.array_equal(np.asarray(Image.open("g.png")), make_grid(expected))
    assert not torch.equal(expected, drawn(of, 5, 4, labels=[0, 2, 0, 2, 0]))


def test_parts_of_a_request_have_the_classes_of_the_whole(of, capsys):
    words = [*REQUEST, "--n", "5", "--labels", "0-2", "--out-dir", "out"]
    for part in ("1/2", "0/2"):
        assert sample.main([*words, "--shard", part]) == 0
    expected = to_uint8(drawn(of, 5, labels=[0, 1, 2, 0, 1]))[..., 0]
    for i, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(sample_path(Path("out"), i))), image)
    assert json.loads((Path("out") / SETTINGS_NAME).read_text())["labels"] == [0, 1, 2]
    sample_path(Path("out"), 3).unlink()
    assert sample.main(words) == 0  # which draws it again, alone
    assert np.array_equal(np.asarray(Image.open(sample_path(Path("out"), 3))), expected[3])
    for more in (["--labels", "0"], ["--guidance", "2"]):
        with pytest.raises(ValueError, match=f"with another {more[0][2:]}"):
            sample.main([*words, *more])


def test_edits_of_classes(of):
    given = ["--images", "digits", "--n", "3", "--start", "1", "--labels", "1,2"]
    fast = ["--method", "fast", "--steps", "2"]
    assert edit.main(["inpaint", *EDIT, *given, *fast, "--out", "a.png"]) == 0
    given = ["--pairs", "2", "--frames", "2", "--labels", "2,0", "--guidance", "2", "--steps", "2"]
    assert edit.main(["interpolate", *EDIT, *given, "--out", "b.png"]) == 0
    sampler = ncsn_fast.Sampler(of, engine="eager", batch_size=2)
    call = {"labels": [2, 2, 0, 0], "guidance": 2.0, "steps": 2, "progress": False}
    expected = make_grid(sampler.interpolate(2, 2, **call), 2)
    assert np.array_equal(np.asarray(Image.open("b.png")), expected)
    images = edit.read_images("digits", 3, of.image_shape, "white")
    mask = edit.make_mask("left", *images.shape[2:])
    call = {"labels": [2, 1, 2], "method": "fast", "steps": 2, "start": 1, "progress": False}
    result = sampler.inpaint(images, mask, **call)
    shown = torch.cat((images, torch.where(mask, images, 0.5), result))
    assert np.array_equal(np.asarray(Image.open("a.png")), make_grid(shown, 3))


def test_evaluate_and_plan(of, capsys):
    assert evaluate.main([*REQUEST, *["--n", "10", "--labels", "0-2", "--guidance", "1.5"]]) == 0
    sampling = json.loads(capsys.readouterr().out)["sampling"]
    assert (sampling["labels"], sampling["guidance"]) == ([0, 1, 2], 1.5)
    sampler = ncsn_fast.Sampler(of, engine="eager", batch_size=2)
    once, twice = (sampler.plan(4, steps=2, guidance=w) for w in (None, 1.5))
    assert twice.flop == 2 * once.flop


def test_labels_are_numbers_and_ranges():
    assert parse_labels("3") == [3]
    assert parse_labels(" 7, 0-2,5 - 5") == [7, 0, 1, 2, 5]


@pytest.mark.parametrize("text", ["", "a", "-1", "1.5", "3-1", "0,,1", "0-9999999", "1" * 30, "١"])
def test_labels_that_are_none(text):
    with pytest.raises(UsageError, match="--labels must be classes, such as 3, 0,3,7 or 0-9"):
        sample.parse(["--labels=" + text])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--guidance 2", "--guidance is towards classes: give --labels"),
        ("--labels 0 --guidance inf", "--guidance must be finite; got inf"),
    ],
)
def test_usage_errors(words, said):
    with pytest.raises(UsageError, match=said):
        sample.parse(words.split())
    with pytest.raises(UsageError, match="--labels is for samples, and --bpd draws none"):
        evaluate.parse(["--bpd", "--labels", "0"])


def test_models_without_these_classes(of, saved_tiny):
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), .*; got 1 .. 3"):
        sample.main([*REQUEST, "--labels", "1-3"])
    for run in (sample, evaluate):
        words = [*REQUEST, "--model", str(saved_tiny), "--labels", "0"]
        with pytest.raises(ValueError, match="this model has no classes"):
            run.main(words)
    words = ["sdedit", *EDIT, "--model", str(saved_tiny), "--labels", "0"]
    with pytest.raises(ValueError, match="this model has no classes"):
        edit.main(words)
