"""The commands: what they write and what they print."""

import importlib.metadata
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import ncsn_fast
from ncsn_fast import __main__ as dispatcher
from ncsn_fast import cache, convert, doctor, edit, evaluate, sample, train
from ncsn_fast.cli import command
from ncsn_fast.data import datasets
from ncsn_fast.data.images import make_grid, to_uint8
from ncsn_fast.engines import Availability, precision
from ncsn_fast.models.unet_architectures import UNETS
from ncsn_fast.training import configs


@pytest.fixture
def model(tiny_folder, monkeypatch) -> ncsn_fast.ScoreModel:
    """The tiny model, whose folder is ./model."""
    monkeypatch.chdir(tiny_folder.parent)
    return ncsn_fast.load(tiny_folder)


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def eager(*words: str) -> list[str]:
    return [*words, "--model", "model", "--engine", "eager", "--quiet"]


def test_sample_writes_a_grid(model, capsys):
    assert sample.main(eager("--n", "5", "--seed", "3", "--columns", "2", "--out", "a/g.png")) == 0
    images = ncsn_fast.Sampler(model, engine="eager").sample(5, seed=3, progress=False)
    assert np.array_equal(read("a/g.png"), make_grid(images, 2))
    said = capsys.readouterr().out
    assert "a/g.png: 5 samples, 9 network evaluations each (ald)" in said


def test_sample_writes_one_file_each_and_goes_on_where_it_stopped(model, capsys):
    arguments = eager("--n", "4", "--start", "998", "--out-dir", "out", "--batch-size", "4")
    assert sample.main(arguments) == 0
    names = sorted(str(path) for path in Path("out").rglob("*.png"))
    assert names == [
        "out/000000/000998.png", "out/000000/000999.png",
        "out/001000/001000.png", "out/001000/001001.png",
    ]  # fmt: skip
    sampler = ncsn_fast.Sampler(model, engine="eager", batch_size=4)
    expected = to_uint8(sampler.sample(4, start=998, progress=False))[..., 0]
    assert all(np.array_equal(read(n), e) for n, e in zip(names, expected, strict=True))
    Path(names[2]).unlink()
    kept = Path(names[1]).read_bytes()
    Path(names[0]).write_bytes(kept)
    assert sample.main(arguments) == 0
    assert np.array_equal(read(names[2]), expected[2])
    assert Path(names[0]).read_bytes() == kept
    assert capsys.readouterr().out.splitlines()[-1] == "out: 1 samples written, 3 were there"
    assert not Path("samples.png").exists()


def test_sample_grid_of_files_is_made_from_the_files(model):
    arguments = eager("--n", "3", "--out-dir", "out", "--out", "grid.png", "--columns", "3")
    assert sample.main(arguments) == 0
    files = [read(f"out/000000/00000{i}.png") for i in range(3)]
    assert np.array_equal(np.stack(tiles("grid.png", 3)), np.stack(files))


@pytest.mark.parametrize("other", [("--seed", "5"), ("--method", "cas"), ("--no-denoise",)])
def test_sample_refuses_a_folder_drawn_with_other_settings(model, other):
    assert sample.main(eager("--n", "2", "--out-dir", "out")) == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*.*")}
    with pytest.raises(ValueError, match=r"drawn with another (seed|method|denoise)"):
        sample.main(eager("--n", "3", "--out-dir", "out", *other))
    assert {path: path.read_bytes() for path in Path("out").rglob("*.*")} == before


def test_a_folder_keeps_to_the_choices_of_its_first_engine(model, monkeypatch):
    """Two machines may choose differently; what they draw differs by more than rounding."""
    tail = ["--engine", "cpu", "--dtype", "fp32", "--quiet", "--out-dir", "out", "--n"]
    words = ["--model", "model", *tail]

    def draw(n: str, algorithm: str, *more: str) -> int:
        monkeypatch.setenv("NCSN_FAST_CONVOLUTIONS", algorithm)
        return sample.main([*words, n, *more])

    assert draw("1", "winograd") == 0
    path = Path("out/settings.json")
    settings = json.loads(path.read_text())
    assert (settings["dtype"], settings["convolutions"]) == ("fp32", "winograd")
    message = (
        r"drawn with another convolutions \(.*\); take a new --out-dir, or give --engine-options "
        r"convolutions winograd$"
    )
    with pytest.raises(ValueError, match=message):
        draw("2", "direct")
    assert draw("2", "direct", "--engine-options", "convolutions", "winograd") == 0
    assert draw("2", "direct") == 0  # nothing is missing
    del settings["convolutions"]  # as older versions and other engines write it
    path.write_text(json.dumps(settings))
    assert draw("3", "direct") == 0
    assert sample.main(eager("--n", "4", "--out-dir", "out")) == 0


def test_a_process_without_work_claims_a_folder_with_the_dtype_that_will_be_used(
    model, monkeypatch
):
    monkeypatch.setitem(precision.BOUNDS, "bf16", 0.0)  # no model is precise enough
    words = ["--model", "model", "--engine", "cpu", "--quiet", "--n", "2", "--batch-size", "2"]
    for shard in ("1/2", "0/2"):
        assert sample.main([*words, "--shard", shard]) == 0
    assert json.loads(Path("samples/settings.json").read_text())["dtype"] == "fp32"


def test_sample_plan_draws_nothing(model, capsys):
    assert sample.main(eager("--n", "7", "--batch-size", "4", "--plan")) == 0
    said = capsys.readouterr().out
    assert "ald: 7 samples, 9 network evaluations each, 2 micro-batches of 4" in said
    assert [path.name for path in Path().iterdir()] == ["model"]


def tiles(path, columns: int) -> list[np.ndarray]:
    """The 8x8 tiles of a grid, row by row (each pixel is six wide, the gap two)."""
    grid = read(path)[..., 0]
    rows = (grid.shape[0] - 2) // 50
    assert grid.shape[1] == columns * 50 + 2
    places = ((2 + 50 * (i // columns), 2 + 50 * (i % columns)) for i in range(rows * columns))
    return [grid[top : top + 48 : 6, left : left + 48 : 6] for top, left in places]


def test_edit_inpaint(model):
    assert edit.main(["inpaint", *eager("--n", "3", "--mask", "top", "--out", "e.png")]) == 0
    originals = datasets.digits("held-out", 8)[0][:3, 0].numpy()
    grid = tiles("e.png", 3)
    assert len(grid) == 9
    for original, known, result in zip(originals, grid[:3], grid[3:6], strict=True):
        assert np.array_equal(known, original)
        assert np.array_equal(result[:4], original[:4])
        assert (result[4:] == 128).all()
    for original, result in zip(originals, grid[6:], strict=True):
        assert np.array_equal(result[:4], original[:4])
        assert not np.array_equal(result[4:], original[4:])


def test_edit_own_image_with_own_mask(model):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save("mine.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 1:7] = 255
    Image.fromarray(mask).save("mask.png")
    options = ("--images", "mine.png", "--mask", "mask.png", "--variant", "ncsn")
    assert edit.main(["inpaint", *eager(*options)]) == 0
    original, _, result = tiles("edited.png", 1)
    assert np.array_equal(original, picture)
    assert np.array_equal(result[mask > 0], picture[mask > 0])
    assert not np.array_equal(result[mask == 0], picture[mask == 0])


def test_edit_interpolate_and_denoise(model):
    assert edit.main(["interpolate", *eager("--pairs", "2", "--frames", "3", "--seed", "1")]) == 0
    sampler = ncsn_fast.Sampler(model, engine="eager")
    frames = to_uint8(sampler.interpolate(2, 3, seed=1, progress=False))[..., 0]
    assert np.array_equal(np.stack(tiles("interpolated.png", 3)), frames)
    assert edit.main(["denoise", *eager("--n", "4", "--sigma", "0.2")]) == 0
    grid = np.stack(tiles("denoised.png", 4)).reshape(3, 4, 8, 8)
    assert np.array_equal(grid[0], datasets.digits("held-out", 8)[0][:4, 0].numpy())
    assert not np.array_equal(grid[1], grid[0])


@pytest.mark.parametrize("name", edit.MASKS)
def test_masks(name):
    mask = edit.make_mask(name, 8, 12)[0]
    expected = {"left": (0, 8, 0, 6), "right": (0, 8, 6, 12), "top": (0, 4, 0, 12),
                "bottom": (4, 8, 0, 12), "centre": (2, 6, 3, 9)}[name]  # fmt: skip
    top, bottom, left, right = expected
    assert mask[top:bottom, left:right].all()
    assert int(mask.sum()) == (bottom - top) * (right - left)


def test_evaluate(model, capsys):
    options = ("--n", "20", "--out", "f.json", "--neighbours", "n.png", "--seed", "5")
    assert evaluate.main(eager(*options)) == 0
    written = json.loads(Path("f.json").read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert written["figures"]["n"] == written["sampling"]["n"] == 20
    assert (written["sampling"]["seed"], written["sampling"]["nfe"]) == (5, 9)
    below = tiles("n.png", 16)[16:]
    train_digits = {d.tobytes() for d in datasets.digits("train", 8)[0].numpy()}
    assert all(tile.tobytes() in train_digits for tile in below)


def test_doctor(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert f"{'torch':24} {torch.__version__}" in said
    assert "eager     yes" in said
    assert "engine='auto' is" in said
    assert f"{'onnx':24} {importlib.metadata.version('onnx')}" in said
    assert f"{'compiled engines':24} 0 in {tmp_path}" in said
    problem = said.split("\ntrt       no ")[1].splitlines()[1].strip()
    assert problem.startswith("torch sees no NVIDIA GPU")
    assert f"{'tensorrt':24} not installed" in said
    assert problem.endswith("tensorrt not installed: pip install 'tensorrt>=10.16,<12'")
    heads = [said.index(head) for head in ("This machine\n", "\nEngines\n", "\nWhat to do next\n")]
    assert heads == sorted(heads)
    assert "they need an NVIDIA GPU" in said[heads[2] :]
    assert "for engine 'trt'" not in said  # there is nothing to install without a GPU


def test_doctor_as_json_for_a_report(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert doctor.main(["--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said)
    assert found["machine"]["torch"] == torch.__version__
    assert found["engines"]["eager"] == {"runs": True, "problem": None}
    assert found["choices"]["auto"].startswith("engine='auto' is")
    assert found["next"][-1].endswith("--json")
    assert str(tmp_path) not in said


def test_doctor_tells_a_driver_without_cuda_in_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.trt_api, "driver", lambda: "NVRM version: 580")
    monkeypatch.setattr(torch.version, "cuda", None)
    steps = doctor.advice([Availability("ort", "", "onnx not installed: pip install onnx")])
    assert any("install the build of torch for CUDA" in step for step in steps)
    assert "for engine 'ort': onnx not installed: pip install onnx" in steps


def test_convert_to_low_precision(model):
    assert convert.main(["model", "small", "--dtype", "bf16"]) == 0
    small, exact = ncsn_fast.load("small").state_dict(), model.state_dict()
    assert torch.equal(small["net.end_conv.weight"], exact["net.end_conv.weight"].bfloat16())
    sizes = [(Path(f) / "model.safetensors").stat().st_size for f in ("small", "model")]
    assert sizes[0] < 0.8 * sizes[1]


def test_convert_spares_a_run(model, capsys):
    assert train.main(tiny.arguments()) == 0
    settings = Path("runs/digits/config.json").read_bytes()
    assert command.run(lambda: convert.main(["model", "runs/digits"])) == 1
    assert "is a training run; write the model folder elsewhere" in capsys.readouterr().err
    assert Path("runs/digits/config.json").read_bytes() == settings


def test_dry_run_resolves_the_published_settings(capsys):
    assert train.main(["--config", "cifar10", "--lr", "3e-4", "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {
        "name": "cifar10", "data": "", "image_size": 32, "channels": 3, "flip": True, "ngf": 128,
        "sigma_begin": 50.0, "sigma_end": 0.01, "n_sigmas": 232, "n_steps_each": 5,
        "epsilon": 6.2e-6, "batch_size": 128, "steps": 300_000, "adam_eps": 1e-8, "ema": 0.999,
        "lr": 3e-4, "grad_clip": 0.0, "autocast": "none",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert train.main(["--config=ffhq", "--dry-run", "--no-flip"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["adam_eps"], found["arch"], found["flip"]) == (1e-3, "ncsnv2_deepest", False)


COMMANDS = {
    "train": train, "sample": sample, "evaluate": evaluate, "convert": convert, "doctor": doctor,
    "cache list": cache, "cache clear": cache, "tune": importlib.import_module("ncsn_fast.tune"),
    "edit inpaint": edit, "edit interpolate": edit, "edit denoise": edit,
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    with pytest.raises(SystemExit) as stop:
        COMMANDS[name].main([*name.split()[1:], "--help"])
    assert stop.value.code == 0
    lines = [line.strip("│| ") for line in capsys.readouterr().out.splitlines()]
    options = [i for i, line in enumerate(lines) if re.match("--[a-z]|SOURCE|FOLDER", line)]
    assert len(options) > 4 or name.split()[0] in ("doctor", "convert", "cache")
    for i, after in itertools.pairwise([*options, len(lines)]):
        explained = re.search(r"  (.{8,}?) \((default: .*?|required)\)", "  ".join(lines[i:after]))
        assert explained, lines[i:after]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("edit inpaint", ["--mask", "--variant", "--images", "--n", "--background", "--animate"]),
        ("edit interpolate", ["--pairs", "--frames", "--out"]),
        ("sample", ["--n", "--out", "--out-dir"]),
        ("evaluate", ["--n", "--out", "--out-dir"]),
    ],
)
def test_help_begins_with_the_options_of_the_command(name, first, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[name].main([*name.split()[1:], "--help"])
    options = re.findall(r"^[│ ]? {0,2}(--[a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE)
    assert options[: len(first)] == first


def test_dispatcher(monkeypatch, capsys):
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ncsn-fast", *words])
        return dispatcher.main()

    assert run("train", "--dry-run", "--config", "church") == 0
    assert json.loads(capsys.readouterr().out)["n_sigmas"] == 788
    assert run("--help") == run() == 0
    said = capsys.readouterr().out
    for name in dispatcher.COMMANDS:
        assert f"\n  {name} " in said
        assert callable(importlib.import_module(f"ncsn_fast.{name}").main)
    assert run("--version") == 0
    assert capsys.readouterr().out == f"ncsn_fast {ncsn_fast.__version__}\n"
    assert run("paint") == 2
    assert "no command 'paint'" in capsys.readouterr().err
    assert run("train", "--keep", "0") == 2


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_configs_are_named_and_valid(name):
    config = configs.CONFIGS[name]
    assert config.name == name
    if config.arch in UNETS:
        assert config.unet_config().image_size == (config.image_size, config.image_size)
    elif config.sigma_begin:
        model_config = config.model_config(
            sigma_begin=config.sigma_begin, n_sigmas=config.n_sigmas, epsilon=config.epsilon
        )
        assert model_config.image_size == (config.image_size, config.image_size)
    assert json.loads(config.to_json())["name"] == name
