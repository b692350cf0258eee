"""Writes the cards of the models that ship, from record.json and figures-*.json in their folders.

`python tools/write_cards.py` writes them, the cards of the classifiers that judge them, and the
table of models in docs/models.md; with `--check` it only says whether they are up to date. The
card of the digits is written by hand, but for its figures (write_figures.py).
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import safetensors
import write_figures
from PIL import Image

from ncsn_fast.checkpoints.model_folder import CONFIG_NAME, WEIGHTS_NAME
from ncsn_fast.checkpoints.shipped import ASSETS, shipped
from ncsn_fast.evaluation.features import CLASSIFIERS

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- shipped:begin -->", "<!-- shipped:end -->"
FAMILIES = {"ncsnv2": "NCSNv2", "unet_a": "the score-SDE tutorial's U-Net"}
LICENCE = """\
## Data and licence

MNIST: Y. LeCun, C. Cortes and C. Burges, *The MNIST database of handwritten digits*,
CC BY-SA 3.0. Weights: MIT, as the code; whoever takes the licence of data to hold for what was
learnt from them has the weights under CC BY-SA 3.0, too.
"""
CARD = """\
# Model card: {name}

{family} of handwritten digits at {size}x{size} pixels, {channels} channel, {millions:.2f} M
parameters (ngf {ngf}), stored in float16 ({megabytes:.1f} MB): `Sampler("{name}")`. It is good
for nothing but digits.

## Training

```
{command}
```

{images:,} images of MNIST's 60 000 for training, over and over ({step:,} steps of {batch}), with
noise levels from sigma {sigma_begin:.4g} to {sigma_end:.4g}. Denoising loss of {n_held_out} test
images at fixed levels and noise, by weights: {losses}{least}. SHA-256 of the data:

{digests}
"""
FIGURES = """
## Figures

{n} unselected samples of each method, seed 0, judged by
[the classifier of MNIST](../mnist_features/README.md):

{table}

*Recognised*: the largest logit of a sample exceeds the second by more than the 5th percentile of
real test digits'; a classifier may be sure of what is no digit, so this is to be read beside the
distances. *Fréchet distance*: between Gaussians fitted to the classifier's 32 features; the right
column has that of as many training digits to the test digits. *Nearest training digit*:
Euclidean. *Copies*: samples nearer to a training digit than 99 % of the first thousand test
digits are.
"""
NEIGHBOURS = """
![Samples, and below each its nearest training digit](neighbours.png)

*The first sixteen samples (`{method}`, seed 0), and below each its nearest training digit.*
"""
CLASSIFIER = """\
# Classifier of MNIST

`--extractor mnist` of `python -m ncsn_fast.evaluate`: a convolutional classifier of MNIST's
digits, {size}x{size} pixels and one channel (other images are made grey and resized),
{parameters:,} parameters in float16 ({kilobytes} KB). Its 32 features stand for Inception's in the
Fréchet and kernel distance, its 10 logits in the inception score, for images like MNIST's; nothing
else should be judged by it, and none of its figures can be compared with published ones.

## Training

```
python tools/train_features.py mnist --data MNIST
```

{recipe}. It names {accuracy:.2%} of the 10 000 test digits rightly. None of them was trained on;
but of three recipes that were tried the best on them was taken, so the figure is a little too high.
SHA-256 of the data, a folder of four files:

{digests}
"""
WIDTH = 118


def reflowed(text: str) -> str:
    """Fills the paragraphs of markdown, but for titles, tables, pictures and blocks of code."""
    parts = text.split("\n\n")
    kept = ("#", "|", "!", "```")
    return "\n\n".join(
        part if part.lstrip().startswith(kept)
        else textwrap.fill(part, WIDTH, break_on_hyphens=False, break_long_words=False)
        for part in (part.strip("\n") for part in parts)
    )  # fmt: skip


def card(folder: Path) -> str:
    """Returns the card of a model's folder."""
    record = json.loads((folder / "record.json").read_text())
    config = json.loads((folder / CONFIG_NAME).read_text())
    held_out = record["held_out"]
    text = CARD.format(
        name=folder.name,
        family=_first_upper(FAMILIES.get(config["arch"], config["arch"])),
        size=config["image_size"][0],
        channels=config["channels"],
        millions=record["parameters"] / 1e6,
        ngf=config["ngf"],
        megabytes=record["bytes"] / 1e6,
        command=record["command"],
        images=record["images_seen"],
        step=record["step"],
        batch=record["config"]["batch_size"],
        sigma_begin=config["sigma_begin"],
        sigma_end=config["sigma_end"],
        n_held_out=held_out["n"],
        losses=", ".join(f"{loss:.2f} ({name})" for name, loss in held_out["losses"].items()),
        least="; the least is what ships" if len(held_out["losses"]) > 1 else "",
        digests=digests(record["data"]),
    )
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("figures-*.json"))]
    if runs:
        table = write_figures.table(runs, f"shipped {folder.name} model", "real test digits")
        text += FIGURES.format(n=runs[0]["figures"]["n"], table=table)
    if (picture := folder / "neighbours.png").exists():
        with Image.open(picture) as image:
            text += NEIGHBOURS.format(method=image.info["method"])
    return reflowed(f"{text}\n{LICENCE}") + "\n"


def classifier_card(folder: Path) -> str:
    """Returns the card of the classifier of MNIST."""
    known = CLASSIFIERS["mnist"]
    record = json.loads((folder / "record.json").read_text())
    with safetensors.safe_open(folder / WEIGHTS_NAME, "pt") as file:
        accuracy = float(file.metadata()["held_out_accuracy"])
    text = CLASSIFIER.format(
        size=known.size,
        parameters=sum(p.numel() for p in known.network().parameters()),
        kilobytes=(folder / WEIGHTS_NAME).stat().st_size // 1000,
        accuracy=accuracy,
        recipe=record["recipe"],
        digests=digests(record["data"]),
    )
    return reflowed(f"{text}\n{LICENCE}") + "\n"


def digests(data: dict[str, str]) -> str:
    """Returns the SHA-256 of files, as a block."""
    return "\n".join(["```", *(f"{digest}  {name}" for name, digest in data.items()), "```"])


def models_table() -> str:
    """Returns the table of the models that ship."""
    rows = ["| name | network | images | file | card |", "|---|---|---|---|---|"]
    for name, folder in shipped().items():
        config = json.loads((folder / CONFIG_NAME).read_text())
        height, width = config["image_size"]
        kilobytes = (folder / WEIGHTS_NAME).stat().st_size / 1e6
        link = f"../ncsn_fast/assets/{name}/README.md"
        family = FAMILIES.get(config["arch"], config["arch"])
        rows.append(
            f"| `{name}` | {family}, ngf {config['ngf']} | {config['channels']}x{height}x{width} "
            f"| {kilobytes:.1f} MB | [card]({link}) |"
        )
    return "\n".join(rows)


def pages() -> dict[Path, str]:
    """Returns what each file should hold."""
    before, rest = TABLE.read_text().split(BEGIN)
    found = {TABLE: f"{before}{BEGIN}\n{models_table()}\n{END}{rest.split(END)[1]}"}
    for folder in shipped().values():
        if (folder / "record.json").exists():
            found[folder / "README.md"] = card(folder)
    if (folder := ASSETS / "mnist_features").exists():
        found[folder / "README.md"] = classifier_card(folder)
    return found


def _first_upper(text: str) -> str:
    return text[0].upper() + text[1:]


def main() -> int:
    """Writes or checks; exit code 1 if --check finds a file out of date."""
    check, stale = "--check" in sys.argv, []
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(text)
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python tools/write_cards.py")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
