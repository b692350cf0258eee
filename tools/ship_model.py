"""Makes a model of a training run ship: the folder `ncsn_fast/assets/NAME`, and all that shows it.

    python tools/ship_model.py weights runs/mnist --name mnist --data MNIST
    python tools/ship_model.py figures mnist --data MNIST
    python -m tools.store_graphs
    python tools/write_cards.py

MNIST is a folder of its four IDX files. `weights` takes, of the weights and their moving averages
in the newest checkpoint, those of the least held-out loss, and stores them in float16 with
record.json: command, data, steps, losses. `figures` draws samples by each of --methods and writes
figures-METHOD-ENGINE.json for each, and neighbours.png; what is there already is kept, so that an
interrupted one can be started again. write_cards.py makes the model card of these files.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ncsn_fast import Sampler
from ncsn_fast.checkpoints.loading import load
from ncsn_fast.checkpoints.model_folder import WEIGHTS_NAME, build_model, save_model
from ncsn_fast.checkpoints.shipped import ASSETS
from ncsn_fast.checkpoints.training_run import RunCheckpoint, read_run
from ncsn_fast.data import datasets
from ncsn_fast.data.files import atomic_write
from ncsn_fast.data.images import make_grid
from ncsn_fast.evaluation.classifier_figures import RealDigits
from ncsn_fast.evaluation.features import load_extractor
from ncsn_fast.evaluation.metrics import nearest_images
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.training.configs import CONFIGS
from ncsn_fast.training.draws import Draws, Part
from ncsn_fast.training.objective import Objective, stratified

RECORD, NEIGHBOURS = "record.json", "neighbours.png"
IDX = "*-ubyte*"  # MNIST's files
HELD_OUT, SHOWN, BATCH = 1000, 16, 100
# Settings of a run that do not change what it learns.
PLACES = {
    "name", "runs", "data", "workers", "device", "threads", "log_every", "snapshot_every", "keep",
    "grid", "max_minutes",
}  # fmt: skip


def candidates(run: RunCheckpoint) -> dict[str, dict[str, Tensor]]:
    """Returns the weights in a checkpoint, and their moving averages, by name."""
    found = {"raw": run.contents["model"], **run.contents.get("averages", {})}
    if run.contents["ema"] is not None:
        found[run.contents.get("ema_name") or "ema"] = run.contents["ema"]
    return found


@torch.no_grad()
def held_out_loss(model: ScoreModel, images: Tensor, power: float) -> float:
    """Returns the mean loss of images uint8 (N, C, H, W), at fixed levels and noise."""
    objective, losses = Objective(model.eval(), power), []
    for start in range(0, len(images), BATCH):
        x = images[start : start + BATCH].float() / 255
        where = torch.arange(start, start + len(x))
        noise = Draws(0, 0, where).normal(x.shape[1:], Part.HELD_OUT)
        losses.append(objective(x, stratified(where), noise)[1])
    return float(torch.cat(losses).mean())


def command(config: dict[str, Any]) -> str:
    """Returns the command that trains a run of this configuration."""
    name = next((n for n in (config["name"], _base(config)) if n in CONFIGS), "digits")
    base = dataclasses.asdict(CONFIGS[name])
    words = [f"--config {name} --data MNIST"]
    for key, value in config.items():
        usual, option = base.get(key), key.replace("_", "-")
        value = tuple(value) if isinstance(value, list) else value
        # Runs of older versions have settings that are now of another kind.
        if key in PLACES or value == usual or type(value) is not type(usual):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words.append(f"--{option} {' '.join(map(str, values))}")
    return "python -m ncsn_fast.train " + " ".join(words)


def _base(config: dict[str, Any]) -> str:
    return "mnist-sde" if str(config.get("arch", "")).startswith("unet") else "mnist"


def digests(data: str) -> dict[str, str]:
    """Returns the SHA-256 of each of MNIST's files."""
    paths = [Path(data)] if Path(data).is_file() else sorted(Path(data).glob(IDX))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def of_split(data: str, split: str, model: ScoreModel) -> datasets.Images:
    """Opens a split of the data at a model's size."""
    channels, size, _ = model.image_shape
    return datasets.open_images(f"{data}:{split}", size=size, channels=channels)


def weights(
    run: Path, folder: Path, data: str, most: float, line: str | None = None
) -> dict[str, Any]:
    """Writes the weights of a run, and the record of how they came to be.

    Args:
        most: MB of the file.   line: the command that trained them, if not that of its config.

    Raises:
        SystemExit: their file is larger than `most` MB.
    """
    checkpoint = read_run(run)
    config = checkpoint.train_config
    models = {
        name: build_model(checkpoint.model_config, state, str(checkpoint.path))
        for name, state in candidates(checkpoint).items()
    }
    images = of_split(data, "test", models["raw"])
    some = datasets.stack(images, list(range(min(HELD_OUT, len(images)))))
    losses = {
        name: held_out_loss(model, some, config["anneal_power"]) for name, model in models.items()
    }
    chosen = min(losses, key=lambda name: losses[name])
    folder.mkdir(exist_ok=True, parents=True)
    for old in (*folder.glob("figures-*.json"), folder / NEIGHBOURS):
        old.unlink(missing_ok=True)  # of other weights
    model = save_model(models[chosen], folder, dtype=torch.float16) and load(folder)
    size = (folder / WEIGHTS_NAME).stat().st_size
    if size > most * 1e6:
        raise SystemExit(f"{folder / WEIGHTS_NAME} has {size / 1e6:.2f} MB; at most {most:g} ship")
    record = {
        "model": model.digest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "step": checkpoint.step,
        "images_seen": checkpoint.step * config["batch_size"],
        "command": line or command({**config, "steps": checkpoint.step}),
        "config": {k: v for k, v in config.items() if k not in PLACES},
        "data": digests(data),
        "held_out": {"split": "test", "n": len(some), "losses": losses, "chosen": chosen},
    }
    _write(folder / RECORD, record)
    return record


def figures(
    folder: Path, data: str, methods: list[str], engines: list[str], n: int
) -> Iterator[Path]:
    """Draws samples and writes their figures; yields the files it wrote."""
    model = load(folder)
    real: RealDigits | None = None
    for method in methods:
        for engine in engines:
            path = folder / f"figures-{method}-{engine}.json"
            if path.exists() and json.loads(path.read_text())["model"] == model.digest():
                continue
            if real is None:
                splits = [of_split(data, split, model) for split in ("train", "test")]
                real = RealDigits(load_extractor("mnist"), *splits)
            sampler = Sampler(model, engine=engine, batch_size=min(n, 64))
            images = sampler.sample(n, method=method, progress=True)
            assert sampler.report is not None
            sampling = {**dataclasses.asdict(sampler.report), "seed": 0, "start": 0}
            _write(path, {
                "model": model.digest(),
                "figures": dataclasses.asdict(real.figures(images)),
                "extractor": real.extractor.describe(),
                "sampling": sampling,
            })  # fmt: skip
            yield path
            if method == methods[0] and engine == engines[0]:
                first = images[:SHOWN]
                nearest, _ = nearest_images(first, real.train)
                grid = make_grid(torch.cat((first, nearest)), len(first))
                save_neighbours(grid, method, folder / NEIGHBOURS)
                yield folder / NEIGHBOURS


def save_neighbours(grid: NDArray[np.uint8], method: str, path: Path) -> None:
    """Writes the picture of samples and their nearest images, with the name of the method in it."""
    known = PngInfo()
    known.add_text("method", method)
    Image.fromarray(grid).save(path, optimize=True, pnginfo=known)


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def main(args: list[str] | None = None) -> int:
    """Runs the command line; exit code 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("weights", "figures"))
    parser.add_argument("source", help="run folder of weights; name of the model of figures")
    parser.add_argument("--name", help="of the model (weights; the run's if not given)")
    parser.add_argument("--data", required=True, help="folder of MNIST's four IDX files")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of all models")
    parser.add_argument("--most", type=float, default=4.0, help="MB of the weights' file at most")
    parser.add_argument("--command", help="that trained the run, in place of its configuration's")
    parser.add_argument("--methods", nargs="+", default=["ald", "fast"])
    parser.add_argument("--engines", nargs="+", default=["cpu"])
    parser.add_argument("--n", type=int, default=1000, help="samples of a method")
    given = parser.parse_args(args)
    if given.what == "weights":
        run = Path(given.source)
        folder = given.assets / (given.name or run.name)
        record = weights(run, folder, given.data, given.most, given.command)
        shown = {k: record[k] for k in ("step", "bytes", "held_out", "command")}
        print(json.dumps(shown, indent=2))
        return 0
    folder = given.assets / given.source
    for path in figures(folder, given.data, given.methods, given.engines, given.n):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
