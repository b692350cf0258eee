"""`python -m ncsn_fast.sample`: draws samples into a grid, or into one file each.

Several processes can share a request, as ranks of torchrun or as --shard of a job array; each
then writes files for its own samples (shards.py).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image
from torch import Tensor

from ncsn_fast import cli, noise, shards
from ncsn_fast.files import atomic_write, remove_leftovers
from ncsn_fast.images import as_tensor, sample_path, save_grid, save_png, to_uint8
from ncsn_fast.jobs import default_batch_size
from ncsn_fast.options import SamplingOptions, check_count, check_png
from ncsn_fast.sampler import Sampler

log = logging.getLogger(__name__)
SETTINGS_NAME = "settings.json"
FOLDER = Path("samples")


@dataclasses.dataclass(frozen=True)
class SampleOptions(SamplingOptions):
    """The command line of `python -m ncsn_fast.sample`."""

    n: int = 64
    """Number of samples."""
    out: Path | None = None
    """Grid of all samples, as PNG (default samples.png unless --out-dir is given)."""
    out_dir: Path | None = None
    """Folder for one PNG per sample, named by its index; files that exist are not drawn again.
    Several processes always write files (default folder samples)."""
    shard: str | None = None
    """I/K: draw only part I (counted from 0: 0 .. K-1) of K, for job arrays: one call for each I,
    with the same --n and --batch-size. `torchrun --nproc-per-node K -m -- ncsn_fast.sample` shares
    the samples out without it (-- lest it takes --n for an option of its own)."""
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
        if self.part() is not None and self.out is not None:
            raise ValueError(
                "--out needs all samples, and a --shard has some of them; when all are drawn, run "
                f"the same command without --shard, with --out-dir {self.out_dir or FOLDER}: it "
                "finds the files, draws nothing and writes the grid"
            )

    def part(self) -> shards.Shard | None:
        """What --shard says."""
        return None if self.shard is None else shards.parse(self.shard)


def claim_folder(
    folder: Path, sampler: Sampler, options: SampleOptions, *, type_counts: bool = True
) -> None:
    """Writes what the folder's samples are drawn with; ValueError if others are there already.

    Samples of two models, seeds or methods in one folder would be a silent mixture. The type the
    network computes in counts only where it is known because an engine was built.
    """
    settings = {
        "model": sampler.model.digest(),
        "dtype": sampler.dtype,
        "seed": options.seed,
        **options.method_options(),
    }
    path = folder / SETTINGS_NAME
    if not path.exists():
        with atomic_write(path, overwrite=False) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
    try:
        there = dict(json.loads(path.read_text()))  # another process may have been first
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} does not say what the samples there were drawn with; take a new --out-dir "
            "(or delete that file, if you know that this command drew them)"
        ) from error
    named = [k for k in {**there, **settings} if type_counts or k != "dtype"]
    changed = [k for k in named if there.get(k) != settings.get(k)]
    if changed:
        raise ValueError(
            f"{folder} holds samples drawn with another {', '.join(changed)} ({path}); "
            "take a new --out-dir"
        )


def write_files(
    sampler: Sampler, options: SampleOptions, folder: Path, block: range
) -> tuple[int, int]:
    """Draws the samples of a block whose files are missing, one PNG each.

    Returns:
        How many were written, and how many were there.
    """
    indices = noise.sample_indices(options.start + block.start, len(block)).tolist()
    missing = {i: path for i in indices if not (path := sample_path(folder, i)).exists()}
    if missing:
        sampler.engine_for(len(missing))  # which may find that the model needs a slower type
    claim_folder(folder, sampler, options, type_counts=bool(missing))
    if not missing:
        return 0, len(indices)
    names = {path.name for path in missing.values()}
    for place in {path.parent for path in missing.values()}:
        remove_leftovers(place, names)
    stream = sampler.stream(
        torch.tensor(list(missing), dtype=torch.int64),
        seed=options.seed,
        progress=not options.quiet,
        **options.method_options(),
    )
    for part, images in stream:
        for index, array in zip(part.tolist(), to_uint8(images), strict=True):
            save_png(array, missing[index])
    return len(missing), len(indices) - len(missing)


def read_files(sampler: Sampler, options: SampleOptions, folder: Path) -> Tensor:
    """The samples of a folder, (n, C, H, W) in [0, 1]."""
    indices = noise.sample_indices(options.start, options.n).tolist()
    pictures = [_read(sample_path(folder, i)) for i in indices]
    return as_tensor(pictures, sampler.model.image_shape)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:  # closed at once: there may be thousands
            return picture.copy()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing, though all samples are drawn: --out needs an --out-dir that all "
            "ranks share; gather the files there, then repeat the command"
        ) from error


def _how(sampler: Sampler) -> str:
    """What the last call did, for people; nothing if nothing was drawn."""
    r = sampler.report
    if r is None:
        return ""
    return (
        f", {r.nfe} network evaluations each ({r.method}), {r.seconds:.1f} s, "
        f"engine {r.engine} {r.dtype}"
    )


def _write(options: SampleOptions, team: shards.Team, sampler: Sampler, folder: Path) -> None:
    """This process's files; then, for all processes, the closing line and the grid."""
    size, parts = _batch_size(options, sampler), team.shard.count
    busy = min(parts, -(-options.n // size))
    if busy < parts:
        log.info(
            "%d micro-batches of %d for %d processes: %d of them have nothing to draw (give a "
            "smaller --batch-size to share out more)", busy, size, parts, parts - busy,
        )  # fmt: skip
    done = write_files(sampler, options, folder, team.shard.block(options.n, size))
    written, there = team.totals(*done)
    if not team.leads:
        return
    who = f", by {parts} ranks" if team.group is not None else ""
    who = f" (shard {team.shard} of {options.n} samples)" if options.shard else who
    print(f"{folder}: {written} samples written, {there} were there{who}")
    if options.out is not None:
        _write_grid(read_files(sampler, options, folder), options, sampler)


def _write_grid(images: Tensor, options: SampleOptions, sampler: Sampler) -> None:
    path = options.out or Path("samples.png")
    save_grid(images, path, options.columns)
    print(f"{path}: {options.n} samples{_how(sampler)}")


def _batch_size(options: SampleOptions, sampler: Sampler) -> int:
    """That of the whole request, also for a part of it, so that a sample's bits are the same."""
    if sampler.batch_size is None:
        sampler.batch_size = default_batch_size(
            options.n, sampler.model.image_shape, sampler.device
        )
    return sampler.batch_size


def _plan(options: SampleOptions, team: shards.Team, sampler: Sampler) -> None:
    """Prints what this process, the first of its team, would do; no other has more."""
    block = team.shard.block(options.n, _batch_size(options, sampler))
    if team.shard.count > 1:
        print(f"part {team.shard} of {options.n} samples, which is for this process:")
    print(sampler.plan(len(block), **options.method_options()))


def _run(options: SampleOptions, team: shards.Team) -> None:
    options = dataclasses.replace(
        options,
        device=team.device(options.engine, options.device),
        quiet=options.quiet or not team.leads,
    )
    with team.one_first():
        sampler = options.sampler()
        if team.group is not None:
            # Times a new machine and remembers; ranks that do so at once would disagree.
            sampler.engine_class.default_dtype()
    several = team.group is not None or options.shard is not None
    folder = options.out_dir or (FOLDER if several else None)
    if options.plan:
        if team.leads:
            _plan(options, team, sampler)
    elif folder is not None:
        _write(options, team, sampler, folder)
    else:
        images = sampler.sample(
            options.n,
            seed=options.seed,
            start=options.start,
            progress=not options.quiet,
            **options.method_options(),
        )
        _write_grid(images, options, sampler)


def main(args: list[str] | None = None) -> int:
    """Command line; exit code 0."""
    options = cli.parse(SampleOptions, args, "ncsn_fast.sample", "Draw samples from a model.")
    with shards.team(options.part()) as team:
        _run(options, team)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
