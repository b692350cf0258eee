"""Command `python -m ncsn_fast.sample`: draws samples into a grid, or into one file each.

Several processes can share a request, as ranks of torchrun or as --shard of a job array; each then
writes the files of its own samples (cli/shards.py).
"""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("sample"))

import dataclasses
import logging
from pathlib import Path

import torch
from torch import Tensor

from ncsn_fast.cli import command, shards
from ncsn_fast.cli.animation import Animation
from ncsn_fast.cli.outputs import check_output, check_output_folder, check_pictures
from ncsn_fast.cli.sample_folder import read_files, write_files
from ncsn_fast.cli.sample_options import FOLDER, GRID, SampleOptions, parse
from ncsn_fast.data.images import grid_shape, save_grid
from ncsn_fast.data.rescue import write_or_keep
from ncsn_fast.inference.runner import Report
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops import noise
from ncsn_fast.sampler import Sampler

log = logging.getLogger(__name__)


def _evaluations(r: Report) -> str:
    if r.nfe == r.nfe_most:
        return f"{r.nfe:g} network evaluations each"
    return f"{r.nfe:.4g} network evaluations on average, at most {r.nfe_most}"


def _how(sampler: Sampler) -> str:
    """Describes the last call; empty if nothing was drawn."""
    r = sampler.report
    if r is None:
        return ""
    return f", {_evaluations(r)} ({r.method}), {r.seconds:.1f} s, engine {r.engine} {r.dtype}"


def _write(
    options: SampleOptions, state: shards.DistributedState, sampler: Sampler, folder: Path
) -> None:
    """Writes this process's files; then rank 0 prints the totals and writes the grid."""
    size, parts = _batch_size(options, sampler), state.shard.count
    busy = min(parts, -(-options.n // size))
    if busy < parts:
        log.info(
            "%d micro-batches of %d for %d processes: %d of them have nothing to draw (give a "
            "smaller --batch-size to share out more)", busy, size, parts, parts - busy,
        )  # fmt: skip
    done = write_files(sampler, options, folder, state.shard.block(options.n, size))
    written, there = state.totals(*done)
    if not state.is_main_process:
        return
    who = f", by {parts} ranks" if state.group is not None else ""
    who = f" (shard {state.shard} of {options.n} samples)" if options.shard else who
    print(f"{folder}: {written} samples written, {there} were there{who}")
    if options.out is not None:
        indices = noise.sample_range(options.start, options.n)
        images = torch.cat(list(read_files(folder, indices, sampler.model.image_shape)))
        _write_grid(images, options, sampler)


def _write_grid(images: Tensor, options: SampleOptions, sampler: Sampler) -> None:
    path = options.out or GRID
    write_or_keep(path, lambda place: save_grid(images, place, options.columns))
    print(f"{path}: {options.n} samples{_how(sampler)}")


def _draw(options: SampleOptions, sampler: Sampler) -> None:
    """Draws all samples into a grid, and their chains into a GIF."""
    call = {**options.sampling(), **options.classes(noise.sample_range(options.start, options.n))}
    if options.animate is None:
        _write_grid(sampler.sample(options.n, **call), options, sampler)
        return
    animation = Animation(float(sampler.model.sigmas[-1]))
    images = sampler.sample(options.n, **animation.of(call))
    _write_grid(images, options, sampler)
    animation.write(options.animate, images, options.columns)
    print(f"{options.animate}: their way from noise")


def _check_outputs(options: SampleOptions, folder: Path | None) -> None:
    """Raises OSError for paths that cannot be written."""
    check_output("--out", options.out if folder else options.out or GRID)
    check_output_folder("--out-dir", folder)
    check_output("--animate", options.animate)


def _check_pictures(options: SampleOptions, model: ScoreModel, folder: Path | None) -> None:
    """Raises ValueError for pictures that cannot be made."""
    check_pictures(model)
    if folder is None or options.out is not None:
        grid_shape(options.n, *model.image_shape[1:], options.columns)


def _batch_size(options: SampleOptions, sampler: Sampler) -> int:
    """Returns the micro-batch size of the whole request.

    Parts use it too, so that a sample has the same bits in each.
    """
    if sampler.batch_size is None:
        sampler.batch_size = sampler.micro_batch(options.n)
    return sampler.batch_size


def _plan(options: SampleOptions, state: shards.DistributedState, sampler: Sampler) -> None:
    """Prints the plan of this process, the first one; no other has more work."""
    block = state.shard.block(options.n, _batch_size(options, sampler))
    if state.shard.count > 1:
        print(f"part {state.shard} of {options.n} samples, which is for this process:")
    call = {"guidance": options.guidance, **options.method_options()}
    print(sampler.plan(len(block), **call))


def _run(options: SampleOptions, state: shards.DistributedState) -> None:
    options = dataclasses.replace(
        options,
        device=state.device(options.engine, options.device),
        quiet=options.quiet or not state.is_main_process,
    )
    several = state.group is not None or options.shard is not None
    if options.animate is not None and several:
        raise command.UsageError("--animate needs one process: start it without torchrun")
    folder = options.out_dir or (FOLDER if several else None)
    if not options.plan:
        _check_outputs(options, folder)
    with state.local_main_process_first():
        sampler = options.sampler()
    options.check_model(sampler.model)
    if not options.plan:
        _check_pictures(options, sampler.model, folder)
    if options.plan:
        if state.is_main_process:
            _plan(options, state, sampler)
    elif folder is not None:
        _write(options, state, sampler, folder)
    else:
        _draw(options, sampler)


def run(options: SampleOptions) -> int:
    """Does what the options say; exit code 0."""
    with shards.distributed(options.part()) as state:
        _run(options, state)
    return 0


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    return run(parse(args))
