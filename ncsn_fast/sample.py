"""`python -m ncsn_fast.sample`: draws samples into a grid, or into one file each."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image
from torch import Tensor

from ncsn_fast import cli, noise
from ncsn_fast.files import atomic_write
from ncsn_fast.images import as_tensor, sample_path, save_grid, save_png, to_uint8
from ncsn_fast.jobs import default_batch_size
from ncsn_fast.options import SamplingOptions, check_count, check_png
from ncsn_fast.sampler import Sampler

SETTINGS_NAME = "settings.json"


@dataclasses.dataclass(frozen=True)
class SampleOptions(SamplingOptions):
    """The command line of `python -m ncsn_fast.sample`."""

    n: int = 64
    """Number of samples."""
    out: Path | None = None
    """Grid of all samples, as PNG (default samples.png unless --out-dir is given)."""
    out_dir: Path | None = None
    """Folder for one PNG per sample, named by its index; files that exist are not drawn again."""
    columns: int | None = None
    """Images per row of the grid."""
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print what would be done, and how long it should take, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--n", self.n)
        check_png("--out", self.out)
        if self.columns is not None:
            check_count("--columns", self.columns)


def claim_folder(folder: Path, sampler: Sampler, options: SampleOptions) -> None:
    """Writes what the folder's samples are drawn with; ValueError if others are there already.

    Samples of two models, seeds or methods in one folder would be a silent mixture.
    """
    settings = {
        "model": sampler.model.digest(),
        "dtype": sampler.dtype,
        "seed": options.seed,
        **options.method_options(),
    }
    path = folder / SETTINGS_NAME
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        return
    there = json.loads(path.read_text())
    changed = [k for k in {**there, **settings} if there.get(k) != settings.get(k)]
    if changed:
        raise ValueError(
            f"{folder} holds samples drawn with another {', '.join(changed)} ({path}); "
            "take a new --out-dir"
        )


def write_files(sampler: Sampler, options: SampleOptions, folder: Path) -> int:
    """Draws the samples whose files are missing, one PNG each; returns how many were written."""
    claim_folder(folder, sampler, options)
    indices = noise.sample_indices(options.start, options.n).tolist()
    missing = [i for i in indices if not sample_path(folder, i).exists()]
    if not missing:
        return 0
    stream = sampler.stream(
        torch.tensor(missing, dtype=torch.int64),
        seed=options.seed,
        progress=not options.quiet,
        **options.method_options(),
    )
    for part, images in stream:
        for index, array in zip(part.tolist(), to_uint8(images), strict=True):
            save_png(array, sample_path(folder, index))
    return len(missing)


def read_files(sampler: Sampler, options: SampleOptions, folder: Path) -> Tensor:
    """The samples of a folder, (n, C, H, W) in [0, 1]."""
    indices = noise.sample_indices(options.start, options.n).tolist()
    pictures = [Image.open(sample_path(folder, i)) for i in indices]
    return as_tensor(pictures, sampler.model.image_shape)


def _how(sampler: Sampler) -> str:
    """What the last call did, for people; nothing if nothing was drawn."""
    r = sampler.report
    if r is None:
        return ""
    return (
        f", {r.nfe} network evaluations each ({r.method}), {r.seconds:.1f} s, "
        f"engine {r.engine} {r.dtype}"
    )


def main(args: list[str] | None = None) -> int:
    """Command line; exit code 0."""
    options = cli.parse(SampleOptions, args, "ncsn_fast.sample", "Draw samples from a model.")
    sampler = options.sampler()
    if options.plan:
        print(sampler.plan(options.n, **options.method_options()))
        return 0
    if options.out_dir is not None:
        # The size of a micro-batch is that of the whole request, also when part of it is there.
        sampler.batch_size = sampler.batch_size or default_batch_size(
            options.n, sampler.model.image_shape, sampler.device
        )
        written = write_files(sampler, options, options.out_dir)
        print(f"{options.out_dir}: {written} samples written, {options.n - written} were there")
        if options.out is None:
            return 0
        images = read_files(sampler, options, options.out_dir)
    else:
        images = sampler.sample(
            options.n,
            seed=options.seed,
            start=options.start,
            progress=not options.quiet,
            **options.method_options(),
        )
    path = options.out or Path("samples.png")
    save_grid(images, path, options.columns)
    print(f"{path}: {options.n} samples{_how(sampler)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
