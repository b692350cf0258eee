"""Makes docs/samples.png and docs/editing.png, and the captions that say of which model they are.

    python tools/write_pictures.py [--data MNIST]

They are of the mnist model if it ships, whose edits need MNIST (a folder of its IDX files) for
their images; else of the digits model: the first four `edit` commands of docs/tutorials/editing.md.
The model's name is kept in the pictures, and `python tools/write_readme.py` puts them together.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ncsn_fast import edit, sample
from ncsn_fast.checkpoints.shipped import shipped
from ncsn_fast.data import datasets

ROOT = Path(__file__).resolve().parent.parent
DOCS, PAGE = ROOT / "docs", ROOT / "docs" / "tutorials" / "editing.md"
BEGIN, END = "<!-- picture:begin -->", "<!-- picture:end -->"
BLOCKS, GAP, SHOWN, SEVEN = 4, 20, 8, 7
HEIGHT = 800  # of a picture, at most twice its pixels
# Arguments of edit for the four blocks of the mnist model; the first starts from one seven.
MNIST_EDITS = (
    "inpaint --mask top",
    "super-resolve --factor 4",
    "deblur --blur 2 --noise 0.02",
    "sdedit --strength 0.6",
)
ALT = (
    "Four blocks of held-out digits: originals, what the model was given, and what it made of that"
)
CAPTIONS = {
    "digits": (
        "*Held-out digits: the originals, what the model was given, and its results. Above: left "
        "halves, and means of 4x4 pixels;\nbelow: blurred and noisy, and half-drowned in noise "
        "(`sdedit`)."
    ),
    "mnist": (
        "*Test digits of MNIST: the originals, what the model was given, and its results. Above: "
        "the top half of one seven,\ncompleted eight times, and means of 4x4 pixels (7x7, made "
        "28x28 again); below: blurred and noisy, and half-drowned\nin noise (`sdedit`)."
    ),
}
END_OF_CAPTION = (
    " Known pixels come back exactly as they were, and\nenlarged images have the means that were "
    "given. To remake it:* `python tools/write_pictures.py`"
)


def commands() -> list[str]:
    """Returns the arguments of the page's first `edit` commands."""
    lines = re.findall(r"^python -m ncsn_fast\.edit (.*)$", PAGE.read_text(), re.M)
    return lines[:BLOCKS]


def mnist_commands(data: str, folder: Path) -> list[str]:
    """Returns the arguments of the mnist model's edits, whose images are written to a folder."""
    size = 28
    test = datasets.open_images(f"{data}:test", size=size, channels=1)
    if test.labels is None:
        raise SystemExit(f"{data} has no labels: give a folder of MNIST's four IDX files")
    seven = int((test.labels == SEVEN).nonzero()[0])
    chosen = {"sevens": [seven] * SHOWN, "digits": list(range(SHOWN))}
    for name, indices in chosen.items():
        (folder / name).mkdir()
        for i, image in enumerate(datasets.stack(test, indices)):
            Image.fromarray(image[0].numpy()).save(folder / name / f"{i}.png")
    sources = (folder / "sevens", *[folder / "digits"] * (BLOCKS - 1))
    return [
        f"{line} --model mnist --images {source} --n {SHOWN} --out {i}.png"
        for i, (line, source) in enumerate(zip(MNIST_EDITS, sources, strict=True))
    ]


def edits(lines: list[str], folder: Path, more: list[str]) -> Image.Image:
    """Returns the grids of `edit` commands, in two rows."""
    grids = []
    for i, line in enumerate(lines):
        path = folder / f"block-{i}.png"
        words = [str(path) if w.endswith(".png") else w for w in line.split()]
        if code := edit.main([*words, *more, "--quiet"]):
            raise SystemExit(code)
        grids.append(Image.open(path).convert("L"))
    width, height = (max(getattr(g, side) for g in grids) for side in ("width", "height"))
    picture = Image.new("L", (2 * width + GAP, 2 * height + GAP), 255)
    for i, grid in enumerate(grids):
        picture.paste(grid, (i % 2 * (width + GAP), i // 2 * (height + GAP)))
    return picture


def save(picture: Image.Image, path: Path, model: str) -> None:
    """Writes a picture, at twice its size if it is small, with the name of its model."""
    if 2 * picture.height <= HEIGHT:
        picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    known = PngInfo()
    known.add_text("model", model)
    picture.save(path, optimize=True, pnginfo=known)


def fill(text: str, model: str) -> str:
    """Replaces picture and caption between the markers of the page on editing."""
    before, rest = text.split(BEGIN)
    block = f"![{ALT}](../editing.png)\n\n{CAPTIONS[model]}{END_OF_CAPTION}"
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def main(args: list[str] | None = None) -> int:
    """Makes both pictures and the caption; exit code 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder of MNIST's IDX files, for the mnist model")
    data = parser.parse_args(args).data
    model = "mnist" if "mnist" in shipped() else "digits"
    if model == "mnist" and data is None:
        parser.error("the mnist model ships, and its edits need --data: MNIST's IDX files")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        grid = folder / "samples.png"
        line = f"--model {model} --n 64 --method fast --out {grid} --quiet"
        if code := sample.main(line.split()):
            return code
        save(Image.open(grid).convert("L"), DOCS / "samples.png", model)
        if model == "mnist":
            picture = edits(mnist_commands(data, folder), folder, [])
        else:
            picture = edits(commands(), folder, ["--engine", "eager"])
        save(picture, DOCS / "editing.png", model)
    PAGE.write_text(fill(PAGE.read_text(), model))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
