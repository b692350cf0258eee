"""`python -m ncsn_fast.evaluate`: what it draws, compares, resumes, writes and refuses."""

import json
import logging
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import unets
from PIL import Image

import ncsn_fast
from ncsn_fast import evaluate
from ncsn_fast.cli import command
from ncsn_fast.cli.sample_folder import write_files
from ncsn_fast.data import datasets
from ncsn_fast.data.images import make_grid, sample_path, to_uint8
from ncsn_fast.diffusion.sde import VP
from ncsn_fast.evaluation import bits_per_dim
from ncsn_fast.evaluation.bits_per_dim import image_log_likelihood
from ncsn_fast.evaluation.features import load_extractor
from ncsn_fast.evaluation.metrics import digit_figures, frechet_distance

FAST_BITS = ("--bpd", "--rtol", "1e-2", "--atol", "1e-2", "--quiet")


@pytest.fixture
def model(tiny_folder, monkeypatch) -> ncsn_fast.ScoreModel:
    """The tiny model, whose folder is ./model."""
    monkeypatch.chdir(tiny_folder.parent)
    return ncsn_fast.load(tiny_folder)


@pytest.fixture
def colour(tmp_path, monkeypatch) -> ncsn_fast.ScoreModel:
    """A tiny model of RGB images, ./model; images of any size are in ./photos."""
    monkeypatch.chdir(tmp_path)
    built = tiny.model(channels=3)
    built.save_pretrained("model")
    pixels = np.random.default_rng(0).integers(0, 256, (25, 12, 9, 3), dtype=np.uint8)
    Path("photos/deep").mkdir(parents=True)
    for i, photo in enumerate(pixels):
        Image.fromarray(photo).save(f"photos/deep/{i:02d}.png")
    return built


def smooth(**changes) -> ncsn_fast.ScoreModel:
    """A model whose flow is short: ./model."""
    settings = {"image_size": (4, 4), "sigma_begin": 1.0, "sigma_end": 0.3, "n_sigmas": 2}
    built = tiny.model(**settings, **changes)
    built.save_pretrained("model")
    return built


def run(*words, capsys) -> dict:
    """The JSON that the command prints."""
    assert evaluate.main([*words, "--model", "model", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def drawn(*words, capsys, n=20) -> dict:
    return run("--n", str(n), "--engine", "eager", *words, capsys=capsys)


def features(images) -> np.ndarray:
    return load_extractor("digits")(torch.as_tensor(images))[0].double().numpy()


def levels(model, n=20, **options) -> torch.Tensor:
    """Samples as the files hold them, (n, C, H, W) uint8."""
    images = ncsn_fast.Sampler(model, engine="eager").sample(n, progress=False, **options)
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)


def test_digits_against_held_out_ones(model, capsys):
    found = drawn("--extractor", "digits", "--seed", "5", "--out", "f.json", capsys=capsys)
    assert json.loads(Path("f.json").read_text()) == found
    held_out = features(datasets.digits("held-out", 8)[0])
    expected = frechet_distance(features(levels(model, seed=5)), held_out)
    assert found["figures"]["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert found["figures"]["n"] == found["sampling"]["n"] == 20
    assert "of 20 samples: not comparable with published FIDs" in found["figures"]["note"]
    assert "fid" not in found["figures"]
    assert found["extractor"] == load_extractor("digits").describe()
    assert found["reference"] == {"source": "digits:held-out", "n": 360}
    assert (found["sampling"]["seed"], found["sampling"]["nfe"]) == (5, 9)
    assert found["figures"]["kid"]["references"] == 360
    assert found["figures"]["inception_score"]["splits"] == 10


def test_figure_extractor_and_hash_are_said_together(model, capsys, caplog):
    with caplog.at_level("INFO", logger="ncsn_fast"):
        found = drawn("--extractor", "digits", capsys=capsys)
    said = next(record.message for record in caplog.records if "Fréchet" in record.message)
    value = f"{found['figures']['frechet_distance']:.4g}"
    for part in (value, "20 samples", "digits", found["extractor"]["sha256"], "not comparable"):
        assert part in said
    assert "FID 0" not in said


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_colour_images_of_any_size_as_reference(colour, capsys, kind):
    source = "photos"
    if kind == "zip":
        source = "photos.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in Path("photos").rglob("*.png"):
                archive.write(path)
    options = ("--extractor", "digits", "--reference", source)
    found = drawn(*options, "--save-reference", "s.npz", "--grid", "g.png", capsys=capsys)
    references = datasets.stack(datasets.open_images("photos", size=8, channels=3))
    expected = frechet_distance(features(levels(colour)), features(references))
    assert found["figures"]["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert found["reference"]["n"] == 25
    shown = ncsn_fast.Sampler(colour, engine="eager").sample(20, progress=False)
    assert np.array_equal(np.asarray(Image.open("g.png")), make_grid(shown))
    again = drawn("--extractor", "digits", "--reference", "s.npz", capsys=capsys)
    assert again["figures"]["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert again["figures"]["kid"]["left_out"].startswith("the reference is mu and sigma")
    assert again["reference"]["n"] == 25
    assert len(again["reference"]["sha256"]) == 64


def test_a_function_of_the_users_extracts(colour, capsys):
    Path("means_of.py").write_text("def channels(x):\n    return x.float().mean(dim=(2, 3))\n")
    found = drawn("--extractor", "means_of:channels", "--reference", "photos", capsys=capsys)
    means = [
        x.to(torch.float64).mean(dim=(2, 3)).numpy()
        for x in (
            levels(colour),
            datasets.stack(datasets.open_images("photos", size=8, channels=3)),
        )
    ]
    expected = frechet_distance(*means)
    assert found["figures"]["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    assert found["extractor"]["name"] == "means_of:channels"
    assert len(found["extractor"]["sha256"]) == 64


def test_neighbours_are_searched_in_the_users_images(colour, capsys):
    options = ("--extractor", "digits", "--reference", "photos")
    drawn(*options, "--neighbours", "n.png", "--data", "photos", capsys=capsys)
    grid = np.asarray(Image.open("n.png"))
    assert grid.shape == (2 * 50 + 2, 16 * 50 + 2, 3)
    photos = datasets.stack(datasets.open_images("photos", size=8, channels=3))
    samples = ncsn_fast.Sampler(colour, engine="eager").sample(16, progress=False)
    nearest = torch.cdist(samples.flatten(1), photos.flatten(1) / 255).argmin(1)
    expected = make_grid(torch.cat((samples, photos[nearest] / 255)), 16)
    assert np.array_equal(grid, expected)


def test_samples_of_a_folder_are_those_in_memory_and_are_not_drawn_again(
    model, capsys, monkeypatch
):
    options = ("--extractor", "digits", "--batch-size", "8")
    memory = drawn(*options, capsys=capsys)
    folder = drawn(*options, "--out-dir", "out", capsys=capsys)
    distance = memory["figures"]["frechet_distance"]
    assert folder["figures"]["frechet_distance"] == pytest.approx(distance, rel=1e-6)
    assert folder["figures"]["kid"] == pytest.approx(memory["figures"]["kid"], rel=1e-6)
    assert len(list(Path("out").rglob("*.png"))) == 20
    sample_path(Path("out"), 7).unlink()
    counts = []
    monkeypatch.setattr(
        evaluate, "write_files", lambda *a: counts.append(write_files(*a)) or counts[-1]
    )
    for _ in range(2):
        assert drawn(*options, "--out-dir", "out", capsys=capsys)["figures"] == folder["figures"]
    assert counts == [(1, 19), (0, 20)]
    assert folder["sampling"]["nfe"] == memory["sampling"]["nfe"]
    assert folder["sampling"]["dtype"] == "fp32"
    with pytest.raises(ValueError, match="drawn with another seed"):
        drawn(*options, "--out-dir", "out", "--seed", "3", capsys=capsys)


def test_digit_figures_of_a_folder(model, capsys):
    found = drawn("--out-dir", "out", capsys=capsys)
    expected = digit_figures(levels(model) / 255)
    assert found["figures"]["nearest_train"] == pytest.approx(expected.nearest_train)
    assert found["figures"]["class_share"] == expected.class_share


def test_bits_of_held_out_digits(in_tmp, capsys):
    model = smooth()
    found = run(*FAST_BITS[:-1], "--n", "5", "--start", "2", "--seed", "3", capsys=capsys)
    images = datasets.digits("held-out", 4)[0][2:7]
    expected = image_log_likelihood(model, images, seed=3, start=2, rtol=1e-2, atol=1e-2).bpd
    assert found["bpd"]["mean"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found["bpd"]["standard_error"] == pytest.approx(float(expected.std() / 5**0.5), rel=1e-2)
    assert (found["bpd"]["n"], found["images"], found["complete"]) == (5, 360, True)
    assert (found["data"], found["bits"], found["data_range"]) == ("digits:held-out", 8, [0, 1])
    assert (found["sigma_min"], found["sigma_max"]) == pytest.approx((0.3, 1.0))
    assert found["model"] == model.digest()


def test_bits_of_ones_own_images_resume(colour, capsys, monkeypatch):
    smooth(channels=3)
    options = ("--data", "photos", "--out-dir", "bits", "--batch-size", "4")
    whole = run(*FAST_BITS[:-1], *options[:2], *options[4:], "--n", "10", capsys=capsys)
    stack = datasets.stack

    def interrupted(images, indices):
        if 8 in indices:
            raise KeyboardInterrupt
        return stack(images, indices)

    monkeypatch.setattr(datasets, "stack", interrupted)
    words = [*FAST_BITS, *options, "--n", "10", "--model", "model", "--out", "b.json"]
    assert command.run(lambda: evaluate.main(words)) == 130
    early = json.loads(capsys.readouterr().out)
    assert json.loads(Path("b.json").read_text()) == early
    assert (early["complete"], early["bpd"]["n"]) == (False, 8)
    read = []
    monkeypatch.setattr(datasets, "stack", lambda im, i: (read.extend(i), stack(im, i))[1])
    assert evaluate.main(words) == 0
    assert read == [8, 9]
    late = json.loads(capsys.readouterr().out)
    assert late["bpd"] == pytest.approx(whole["bpd"])
    assert late["complete"]
    with pytest.raises(ValueError, match=r"holds likelihoods computed with another .*trace"):
        evaluate.main([*words, "--trace", "gaussian"])


def test_likelihoods_of_other_images_are_not_taken_for_these(colour, tmp_path, monkeypatch, capsys):
    smooth(channels=3)
    words = (*FAST_BITS[:-1], "--out-dir", str(tmp_path / "bits"), "--n", "1", "--data")
    first = run(*words, "photos", capsys=capsys)
    assert first["data"] == str((tmp_path / "photos").resolve())
    assert run(*words, "photos/../photos", capsys=capsys)["images_sha256"] == first["images_sha256"]
    photo = Path("photos/deep/24.png")  # the last, which is not measured
    pixels = np.asarray(Image.open(photo)).copy()
    Image.fromarray(255 - pixels).save(photo)
    with pytest.raises(ValueError, match="with another images_sha256"):
        run(*words, "photos", capsys=capsys)
    Image.fromarray(pixels).save(photo)
    assert run(*words, "photos", capsys=capsys) == first
    photo.rename("photos/deep/25.png")
    with pytest.raises(ValueError, match="with another images_sha256"):
        run(*words, "photos", capsys=capsys)


def test_bits_of_a_vp_network_say_their_conventions(in_tmp, capsys):
    """The flow starts at t = 1e-5, where the published networks' training does."""
    model = ncsn_fast.ScoreModel(unets.config("ddpmpp")).eval()
    model.save_pretrained("model")
    words = ("--bpd", "--rtol", "0.5", "--atol", "0.5", "--n", "1")
    found = run(*words, capsys=capsys)
    image = datasets.digits("held-out", 8)[0][:1]
    expected = image_log_likelihood(model, image, rtol=0.5, atol=0.5).bpd
    assert found["bpd"]["mean"] == pytest.approx(float(expected), rel=1e-6)
    assert 2 * found["sigma_min"] == pytest.approx(float(VP().noise_level(1e-5)), rel=1e-6)
    assert found["dequantisation"] == "uniform, (level + u) / 256"
    assert found["prior"] == "N(0, sigma_max^2 I)"
    assert found["unit"] == "images in [0, 1]: -log2 p(x) / dimensions + 8"


def test_exact_traces(in_tmp, capsys):
    model = smooth()
    rough = {"rtol": 0.5, "atol": 0.5}
    words = ("--bpd", "--trace", "exact", "--rtol", "0.5", "--atol", "0.5", "--n", "1")
    found = run(*words, capsys=capsys)
    image = datasets.digits("held-out", 4)[0][:1]
    expected = image_log_likelihood(model, image, trace="exact", **rough).bpd
    assert found["trace"] == "exact"
    assert found["bpd"]["mean"] == float(expected)
    assert found["bpd"]["standard_error"] is None


IDLE = {
    "--bpd --method cas": "--method is for samples, and --bpd draws none",
    "--bpd --extractor digits": "--extractor is for samples",
    "--bpd --grid g.png": "--grid is for samples",
    "--bpd --no-denoise": "--denoise is for samples",
    "--bpd --engine cpu": "--bpd needs gradients",
    "--bpd --dtype bf16": "leave --engine, --engine-options and --dtype out",
    "--bpd --engine-options graph step": "--bpd needs gradients",
    "--bpd --n 0": "--n must be at least 1",
    "--bpd --n-probes 0": "--n-probes must be at least 1",
    "--bpd --batch-size 0": "--batch-size must be at least 1; got 0",
    "--bpd --batch-size -1": "--batch-size must be at least 1; got -1",
    "--bpd --threads 0": "--threads must be at least 1; got 0",
    "--bpd --rtol 0": "--rtol must be in (1e-6, 1)",
    "--trace exact": "--trace is for --bpd",
    "--rtol 1e-3": "method 'ald' has no option rtol",
    "--method cas --n-steps-each 3": "method 'cas' has no option n_steps_each",
    "--reference photos": "--reference needs an --extractor",
    "--save-reference a.npz": "--save-reference needs an --extractor",
    "--background black": "--background is for --data or --reference",
    "--data photos": "--data is for --bpd or --neighbours",
    "--n 9": "--n must be at least 10",
    "--grid g.jpg": "--grid must end in .png",
    "--extractor digits --save-reference a.txt": "--save-reference must end in .npz",
}


@pytest.mark.parametrize("line", IDLE)
def test_options_that_would_change_nothing_are_refused(line, in_tmp, capsys):
    assert command.run(lambda: evaluate.main(line.split())) == 2
    assert IDLE[line] in capsys.readouterr().err


EARLY = {
    "--extractor nowhere.pt --reference digits": "extractor nowhere.pt does not exist",
    "--extractor no.where:f --reference digits": "--extractor no.where:f: No module named 'no'",
    "--extractor digits --reference nowhere": "nowhere does not exist",
    "--extractor digits --reference nowhere.npz": "cannot read nowhere.npz",
    "--extractor digits --out words.txt/f.json": "cannot write --out words.txt",
    "--extractor digits --out-dir words.txt": "words.txt is not a folder; choose another place",
    "--grid model.png": "it is a folder",
    "--neighbours n.png --data nowhere": "nowhere does not exist",
    "--bpd --data nowhere": "nowhere does not exist",
    "--bpd --n 361": "digits:held-out has 360 images, too few for --n 361 from --start 0",
    "--bpd --start 360": "too few for --n 0 from --start 360",
}


@pytest.mark.parametrize("line", EARLY)
def test_what_cannot_work_is_said_before_anything_is_drawn(line, model, capsys, monkeypatch):
    def never(*words, **options):
        raise AssertionError("work has begun")

    for name in ("stream", "sample"):
        monkeypatch.setattr(ncsn_fast.Sampler, name, never)
    monkeypatch.setattr(bits_per_dim, "log_likelihood", never)
    Path("words.txt").write_text("words")
    Path("model.png").mkdir()
    words = [*line.split(), "--model", "model", "--quiet"]
    assert command.run(lambda: evaluate.main(words)) == 1
    assert EARLY[line] in capsys.readouterr().err


def test_colour_models_need_an_extractor_a_reference_and_data(colour, capsys):
    for line, text in {
        "--n 20": "give an --extractor and a --reference",
        "--extractor digits": "the digits are grey",
        "--extractor digits --reference photos --neighbours n.png": "--neighbours needs --data",
        "--bpd": "--bpd needs --data",
    }.items():
        assert (
            command.run(lambda line=line: evaluate.main([*line.split(), "--model", "model"])) == 1
        )
        assert text in capsys.readouterr().err


def test_the_networks_of_2019_are_refused(in_tmp, capsys):
    tiny.model(arch="ncsn").save_pretrained("model")
    assert command.run(lambda: evaluate.main(["--bpd", "--model", "model"])) == 1
    assert "no probability flow and no likelihood" in capsys.readouterr().err


DEFAULTS = {
    "": "an --extractor and a --reference",
    "--extractor digits": "a --reference",
    "--bpd --n 1 --rtol 1e-2 --atol 1e-2": "--data, the images whose likelihood",
}


@pytest.mark.parametrize("options", DEFAULTS)
def test_the_digits_are_no_reference_for_models_of_something_else(options, model, capsys, caplog):
    run = Path("runs/mine")
    shutil.copytree("model", run / "checkpoints")
    (run / "checkpoints" / "step_00000001.pt").touch()
    (run / "config.json").write_text(json.dumps({"data": "photos"}))
    chosen = evaluate.EvaluateOptions(model=str(run), quiet=True)
    with pytest.raises(ValueError, match=r"runs/mine was trained on photos, .*: give DATA"):
        evaluate.check_learnt_digits(chosen, model, "DATA")
    (run / "config.json").write_text(json.dumps({"data": "digits"}))
    evaluate.check_learnt_digits(chosen, model, "DATA")
    evaluate.check_learnt_digits(evaluate.EvaluateOptions(), ncsn_fast.load("digits"), "DATA")
    assert "nothing says" not in caplog.text
    fast = [] if "--bpd" in options else ["--n", "10", "--engine", "eager"]
    run_quietly = [*options.split(), *fast, "--model", "model", "--quiet"]
    with caplog.at_level(logging.WARNING):
        assert evaluate.main(run_quietly) == 0
    assert "nothing says that this model learnt them" in caplog.text
    assert f"so give {DEFAULTS[options]}" in caplog.text


def test_figures_say_which_published_sampler_drew_the_samples(in_tmp, capsys):
    ncsn_fast.ScoreModel(unets.config("ddpmpp")).eval().save_pretrained("model")
    words = ("--n", "10", "--engine", "eager", "--extractor", "digits", "--reference")
    named = ("digits:held-out", "--published", "vp-pc", "--steps", "3")
    found = run(*words, *named, capsys=capsys)
    drawn = {name: found["sampling"][name] for name in ("published", "method", "steps", "t_end")}
    assert drawn == {"published": "vp-pc", "method": "em", "steps": 3, "t_end": 1e-3}
    assert (found["figures"]["n"], found["sampling"]["nfe"]) == (10, 3)
    with pytest.raises(ValueError, match="ve-pc is of VE networks, and this model's is VP"):
        run(*words, "digits:held-out", "--published", "ve-pc", capsys=capsys)
