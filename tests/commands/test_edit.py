"""The commands of `python -m ncsn_fast.edit` that restore, vary and guide."""

import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

import ncsn_fast
from ncsn_fast import edit
from ncsn_fast.cli import command
from ncsn_fast.cli.arguments import import_function
from ncsn_fast.data import datasets
from ncsn_fast.data.images import to_uint8
from ncsn_fast.ops.noise import Stream, normal
from ncsn_fast.samplers.operators import gaussian_blur


@pytest.fixture
def grey(tiny_folder, monkeypatch):
    """A Sampler of the grey tiny model, whose folder is ./model."""
    monkeypatch.chdir(tiny_folder.parent)
    return ncsn_fast.Sampler(tiny_folder, engine="eager")


@pytest.fixture
def colour(tmp_path, monkeypatch):
    """A Sampler of a tiny model of colours, whose folder is ./model; ./photos has three images."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(pixels):
        Image.fromarray(photo).save(tmp_path / "photos" / f"{i}.png")
    return ncsn_fast.Sampler(tiny.model(channels=3).save_pretrained("model"), engine="eager")


def digits(n, size=8):
    return datasets.digits("held-out", size)[0][:n].float() / 255


def run(line, rows):
    """What a command writes: tiles (rows, columns, C, 8, 8) in [0, 1]."""
    options = ["--model", "model", "--engine", "eager", "--quiet", "--method", "cas"]
    assert edit.main([*line.split(), *options]) == 0
    out = re.search(r"--out (\S+)", line)
    sheet = np.asarray(Image.open(out[1] if out else "edited.png"))
    columns = (sheet.shape[1] - 2) // 50
    assert sheet.shape == (50 * rows + 2, 50 * columns + 2, 3)
    places = itertools.product(range(2, 50 * rows, 50), range(2, 50 * columns, 50))
    tiles = np.stack([sheet[a : a + 48 : 6, b : b + 48 : 6] for a, b in places])
    return tiles.reshape(rows, columns, 8, 8, 3)


def as_tiles(images):
    return np.broadcast_to(to_uint8(images), (len(images), 8, 8, 3))


def test_super_resolve(grey):
    original, small, result = run("super-resolve --n 3 --factor 2 --seed 4 --out a/s.png", 3)
    images = digits(3)
    means = avg_pool2d(images, 2)
    assert np.array_equal(original, as_tiles(images))
    assert np.array_equal(small, as_tiles(means.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    expected = grey.super_resolve(means, 2, method="cas", seed=4, progress=False)
    assert np.array_equal(result, as_tiles(expected))


def test_deblur_adds_noise_and_says_so(grey):
    original, blurred, result = run("deblur --n 2 --blur 1.5 --noise 0.05 --start 3", 3)
    images, indices = digits(2), torch.arange(3, 5)
    y = gaussian_blur(1.5, 8, 8).apply(images) + 0.05 * normal(0, indices, 7, 0, (1, 8, 8))
    assert np.array_equal(blurred, as_tiles(y))
    options = {"noise": 0.05, "method": "cas", "start": 3, "progress": False}
    assert np.array_equal(result, as_tiles(grey.deblur(y, 1.5, **options)))
    assert np.array_equal(original, as_tiles(images))


def test_colourise(colour):
    original, given, result = run("colourise --images photos --n 3", 3)
    assert abs(original.mean(3) - given[..., 0]).max() <= 0.5
    assert (given == given[..., :1]).all()
    assert (result != result[..., :1]).any()
    images = torch.from_numpy(original.copy()).permute(0, 3, 1, 2) / 255
    expected = colour.colourise(images.mean(1, keepdim=True), method="cas", progress=False)
    assert abs(result.astype(int) - as_tiles(expected)).max() <= 1


def test_given_images_are_not_measured(colour):
    given, result = run("colourise --images photos --n 2 --given --how projected", 2)
    one = run("colourise --images photos/0.png --given --how projected", 2)
    assert given.shape == result.shape == (2, 8, 8, 3)
    assert np.array_equal(one[0, 0], given[0])
    measured = torch.from_numpy(given[..., :1].copy()).permute(0, 3, 1, 2)
    options = {"how": "projected", "method": "cas", "progress": False}
    assert np.array_equal(result, as_tiles(colour.colourise(measured, **options)))
    small, result = run("super-resolve --images photos --n 3 --factor 4 --given", 2)
    blocks = torch.from_numpy(small[:, ::4, ::4].copy()).permute(0, 3, 1, 2)
    expected = colour.super_resolve(blocks, 4, method="cas", progress=False)
    assert np.array_equal(result, as_tiles(expected))


@pytest.mark.parametrize(("option", "level"), [
    ("", {"strength": 0.5}), ("--strength 0.3", {"strength": 0.3}), ("--sigma 0.7", {"sigma": 0.7}),
])  # fmt: skip
def test_sdedit(grey, option, level):
    original, noisy, result = run(f"sdedit --n 3 --seed 2 {option}", 3)
    images = digits(3)
    assert np.array_equal(original, as_tiles(images))
    ladder = grey.model.sigmas  # 5, 0.63, 0.079, 0.01
    sigma = ladder[{"": 1, "--strength 0.3": 2, "--sigma 0.7": 1}[option]]
    z = normal(2, torch.arange(3), Stream.INITIAL, 0, (1, 8, 8))
    assert abs(noisy.astype(int) - as_tiles(images + float(sigma) * z)).max() <= 1
    expected = grey.sdedit(images, **level, method="cas", seed=2, progress=False)
    assert np.array_equal(result, as_tiles(expected))


def test_guide(grey, monkeypatch):
    Path("mine.py").write_text(
        "def bright(x, sigma):\n"
        "    mean = x.flatten(1).mean(1, keepdim=True)\n"
        "    return -4 * (mean - mean.new_tensor([0.0, 1.0])).square()\n"
    )
    # As an installed command starts: without the working folder among the modules'.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".", str(Path.cwd()))])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    free, dark, bright = run("guide --classifier mine:bright --labels 0 1 --n 4 --seed 5", 3)
    assert np.array_equal(free, as_tiles(grey.sample(4, seed=5, method="cas", progress=False)))
    assert (dark.mean((1, 2, 3)) < free.mean((1, 2, 3))).all()
    assert (bright.mean((1, 2, 3)) > free.mean((1, 2, 3))).all()
    expected = grey.guided(
        [1] * 4, import_function("", "mine:bright"), method="cas", seed=5, progress=False
    )
    assert np.array_equal(bright, as_tiles(expected))


ERRORS = {
    "no factor": ("super-resolve --factor 0", 2, "--factor must be at least 1; got 0"),
    "factor": ("super-resolve --factor 3", 1, "factor must divide 8 and 8; got 3"),
    "grey": ("colourise", 1, "colourise needs a model of RGB images; this one's have 1 channel"),
    "no blur": ("deblur --blur 0", 2, "--blur must be positive and finite; got 0.0"),
    "noise": ("deblur --noise -1", 2, "--noise must be at least 0 and finite; got -1.0"),
    "imposed noise": ("deblur --how imposed", 1, "without noise, 'imposed'"),
    "how": ("deblur --how by-hand", 2, "invalid choice 'by-hand' for argument '--how'"),
    "two levels": ("sdedit --sigma 1 --strength 1", 2, "either --strength or --sigma, not both"),
    "strength": ("sdedit --strength 2", 2, "--strength must be in [0, 1]; got 2.0"),
    "sigma": ("sdedit --sigma 0.001", 1, "on the model's ladder, from 0.01 to 5; got 0.001"),
    "no sigma": ("sdedit --sigma 0", 2, "--sigma must be positive and finite; got 0.0"),
    "no noise": ("denoise --sigma -1", 2, "--sigma must be positive and finite; got -1.0"),
    "no classifier": ("guide", 2, "--classifier must be MODULE:NAME; got ''"),
    "no function": ("guide --classifier mine", 2, "--classifier must be MODULE:NAME; got 'mine'"),
    "no module": ("guide --classifier mine_not:f", 1, "--classifier mine_not:f: No module named"),
    "no name": ("guide --classifier math:nope", 1, "--classifier math:nope: module 'math' has no"),
    "no callable": ("guide --classifier math:pi", 1, "--classifier math:pi is no function; it is"),
    "odd classifier": ("guide --classifier torch:mul", 1, "return logits (1, K) for one image;"),
    "label": ("guide --classifier math:sin --labels -1", 2, "--labels must be at least one"),
    "no images": ("super-resolve --n 0", 2, "--n must be at least 1; got 0"),
    "no png": ("sdedit --out a.jpg", 2, "--out must end in .png"),
    "no colour": ("sdedit --background whitish", 2, "background must be a colour such as white"),
    "ode": ("inpaint --method ode --variant ncsn", 1, "imposes nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, grey, capsys):
    line, code, text = ERRORS[case]
    words = [*line.split(), "--model", "model", "--engine", "eager", "--quiet"]
    assert command.run(lambda: edit.main(words)) == code
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ")
    assert text in said[-1]
    assert not list(Path().glob("*.png"))


@pytest.fixture
def in_tmp_masks(in_tmp):
    """Masks of 8x8, left half known, in several ways."""
    half = np.zeros((8, 8), np.uint8)
    half[:, :4] = 255
    Image.fromarray(half).save("plain.png")
    Image.fromarray(half > 0).save("one_bit.png")
    Image.fromarray(np.stack([half * 0 + 255, half], -1)).save("alpha.png")  # white throughout
    Image.fromarray(half // 255 * 200 + 20).save("grey.png")
    Image.fromarray(half.repeat(3, 0).repeat(3, 1)).save("large.png")
    wide = np.concatenate([half * 0, half, half * 0 + 255], 1)  # of which the middle is seen
    Image.fromarray(wide).save("wide.png")
    Image.fromarray(half.astype(np.uint16) * 257).save("deep.png")
    return half > 0


MASKS = {
    "plain": [], "one_bit": [],
    "alpha": ["composited on #000000"],
    "grey": ["--mask grey.png has 64 of 64 pixels between black and white; those of at least 128"],
    "large": ["--mask large.png is 24x24; it is cropped and resized to 8x8"],
    "wide": ["--mask wide.png is 24x8; it is cropped and resized to 8x8"],
    "deep": ["only their high byte is used"],
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_files(name, in_tmp_masks, caplog):
    mask = edit.make_mask(f"{name}.png", 8, 8)
    assert mask.shape == (1, 8, 8)
    assert np.array_equal(mask[0].numpy(), in_tmp_masks)
    texts = [r.getMessage() for r in caplog.records]
    assert len(texts) == len(MASKS[name])
    assert all(words in text for words, text in zip(MASKS[name], texts, strict=True))


def test_masks_that_are_refused(in_tmp_masks):
    Image.new("L", (8, 8), 255).save("white.png")
    Image.new("RGBA", (8, 8)).save("empty.png")
    Path("words.png").write_text("no mask")
    Path("half.png").write_bytes(Path("plain.png").read_bytes()[:50])
    for name, words in {
        "white": "--mask white.png makes every pixel known; known pixels are white and opaque",
        "empty": "--mask empty.png makes no pixel known",
        "words": "cannot decode words.png: not a PNG, JPEG",
        "half": "cannot decode half.png: ",
        "nowhere": "--mask must be left, right, .* got 'nowhere.png' .there is no such file",
    }.items():
        with pytest.raises(ValueError, match=words):
            edit.make_mask(f"{name}.png", 8, 8)
    with pytest.raises(ValueError, match=r"must have the size of the images, 12x8; got 8x8"):
        edit.make_mask("plain.png", 8, 12)


def test_background(colour):
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save("clear.png")
    for option, level in (("", 255), (" --background black", 0), (" --background #0a0a0a", 10)):
        original, _, _ = run(f"sdedit --images clear.png --n 1{option}", 3)
        assert (original == level).all()


@pytest.mark.parametrize(
    "name", ["inpaint", "colourise", "super-resolve", "deblur", "sdedit", "guide"]
)
def test_help_explains_every_option(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    with pytest.raises(SystemExit) as stop:
        edit.main([name, "--help"])
    assert stop.value.code == 0
    lines = [line.strip("│| ") for line in capsys.readouterr().out.splitlines()]
    options = [i for i, line in enumerate(lines) if re.match("--[a-z]", line)]
    assert len(options) > 30
    for i, after in itertools.pairwise([*options, len(lines)]):
        explained = re.search(r"  (.{8,}?) \((default: .*?|required)\)", "  ".join(lines[i:after]))
        assert explained, lines[i:after]
