"""Command `python -m ncsn_fast.evaluate`: figures of samples, or bits per dimension of a data set.

Without --extractor, samples of a digits model get the figures of its model card; with it, samples
of any model get FID, KID and the inception score against a reference. --bpd draws nothing.
"""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("evaluate"))

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ncsn_fast import engines
from ncsn_fast.checkpoints.loading import load, resolve_model
from ncsn_fast.checkpoints.shipped import DEFAULT, shipped
from ncsn_fast.checkpoints.training_run import is_run, newest_run, training_data
from ncsn_fast.cli.arguments import check_source, open_extractor
from ncsn_fast.cli.evaluate_options import EvaluateOptions, parse
from ncsn_fast.cli.outputs import check_output, check_output_folder, check_pictures
from ncsn_fast.cli.sample_folder import claim_folder, read_files, read_settings, write_files
from ncsn_fast.data import datasets
from ncsn_fast.data.damaged import SKIP
from ncsn_fast.data.files import atomic_write
from ncsn_fast.data.images import UInt8, make_grid, save_png
from ncsn_fast.data.kept import keep
from ncsn_fast.data.rescue import write_or_keep
from ncsn_fast.evaluation.bits_per_dim import (
    BITS,
    DATA_RANGE,
    LikelihoodSettings,
    Record,
    batch_size_for,
    measure,
    model_ends,
)
from ncsn_fast.evaluation.evaluator import (
    BATCH,
    Evaluator,
    describe_source,
    is_statistics,
    open_source,
)
from ncsn_fast.evaluation.metrics import digit_figures, nearest_images
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops import noise
from ncsn_fast.sampler import Sampler
from ncsn_fast.samplers import methods

log = logging.getLogger(__name__)
SHOWN, COMPARED = 64, 16  # number of samples in --grid and in --neighbours
BITS_NAME = "bits.jsonl"
CONVENTIONS = {
    "dequantisation": f"uniform, (level + u) / {2**BITS}",
    "prior": "N(0, sigma_max^2 I)",
    "unit": f"images in [0, 1]: -log2 p(x) / dimensions + {BITS}",
}  # of --bpd


Picture = tuple[Path, UInt8]


def check_outputs(options: EvaluateOptions) -> None:
    """Raises OSError for paths that cannot be written, before hours of work."""
    for name in ("out", "grid", "neighbours", "save_reference"):
        check_output(f"--{name.replace('_', '-')}", getattr(options, name))
    check_output_folder("--out-dir", options.out_dir)


def draw(options: EvaluateOptions, sampler: Sampler) -> Iterator[Tensor]:
    """Yields the samples in batches (B, C, H, W) in [0, 1], from --out-dir if it is given."""
    indices = noise.sample_range(options.start, options.samples())
    if options.out_dir is None:
        for _, images in sampler.stream(
            indices, seed=options.seed, progress=not options.quiet, **options.method_options(),
            **options.classes(indices),
        ):  # fmt: skip
            yield images
        return
    write_files(sampler, options, options.out_dir, range(len(indices)))
    with tqdm(total=len(indices), desc="samples", unit="image", disable=options.quiet) as bar:
        for images in read_files(options.out_dir, indices, sampler.model.image_shape, BATCH):
            yield images
            bar.update(len(images))


def check_learnt_digits(options: EvaluateOptions, model: ScoreModel, remedy: str) -> None:
    """Checks that a model learnt the digits, before it is compared with them by default.

    Logs a warning where nothing says what it learnt.

    Raises:
        ValueError: it was trained on something else.
    """
    run = Path(options.model).expanduser() if options.model else newest_run(Path("runs"))
    data = training_data(run) if run is not None and is_run(run) else None
    if data == "digits" or model.digest() == load(DEFAULT).digest():
        return
    ships = str(options.model) in shipped() and not Path(str(options.model)).exists()
    if data is not None or ships:
        raise ValueError(
            f"{options.model if ships else run} was trained on {data or 'other images'}, and would "
            f"be compared with the UCI digits: give {remedy}"
        )
    log.warning(
        "compared with the UCI digits, and nothing says that this model learnt them: if it learnt "
        "something else the figures mean nothing, so give %s", remedy,
    )  # fmt: skip


def evaluate_samples(options: EvaluateOptions) -> tuple[dict[str, Any], list[Picture]]:
    """Draws and evaluates samples; returns the figures for JSON, and the requested grids."""
    extractor = None if options.extractor is None else open_extractor(options.extractor)
    sampler = options.sampler()
    model = sampler.model
    options.check_model(model)
    settings = options.method_options()
    program = methods.build(settings.pop("method"), model, settings.pop("steps"), settings)
    digits = model.image_shape[0] == 1 and model.image_shape[1] == model.image_shape[2]
    if options.extractor is None and not digits:
        raise ValueError(
            f"without --extractor, figures are for models of the digits (1, S, S), and this one is "
            f"{model.image_shape}; give an --extractor and a --reference"
        )
    if options.extractor is None:
        check_learnt_digits(options, model, "an --extractor and a --reference")
    elif options.reference is None and options.extractor == "digits":
        check_learnt_digits(options, model, "a --reference")
    elif options.neighbours is not None and options.data is None and digits:
        check_learnt_digits(options, model, "--data, the images that it learnt from")
    if options.grid or options.neighbours or options.out_dir:
        check_pictures(model)
    if options.neighbours is not None and options.data is None and not digits:
        raise ValueError("--neighbours needs --data: the images that the model learnt from")
    searched = None
    if options.neighbours:
        searched = keep(
            open_source(options.data or "digits:train", model, options.background),
            model.image_shape,
            skip_damaged=options.skip_damaged,
            progress=not options.quiet,
        )
    evaluator = None
    if extractor is not None:
        evaluator = Evaluator(
            extractor.to(sampler.device),
            options.reference,
            model,
            options.samples(),
            seed=options.seed,
            save=options.save_reference,
            background=options.background,
            skip_damaged=options.skip_damaged,
            progress=not options.quiet,
        )
    kept: list[Tensor] = []  # all for the figures of the digits, else those in the grids
    for images in draw(options, sampler):
        if evaluator is not None:
            evaluator.add(images)
        if evaluator is None or sum(map(len, kept)) < SHOWN:
            kept.append(images)
    samples = torch.cat(kept)
    found: dict[str, Any]
    if evaluator is None:
        found = {"figures": dataclasses.asdict(digit_figures(samples))}
    else:
        found = evaluator.figures()
    found = {"model": model.digest(), **found}
    found["sampling"] = _sampling(options, sampler, program.nfe)
    return found, list(_pictures(options, samples, searched))


def _pictures(
    options: EvaluateOptions, samples: Tensor, searched: datasets.Images | None
) -> Iterator[Picture]:
    """Makes the requested grids."""
    if options.grid is not None:
        yield options.grid, make_grid(samples[:SHOWN])
    if options.neighbours is not None and searched is not None:
        first = samples[:COMPARED]
        nearest, _ = nearest_images(first, searched)
        yield options.neighbours, make_grid(torch.cat((first, nearest)), len(first))


def _sampling(options: EvaluateOptions, sampler: Sampler, nfe: int | None) -> dict[str, Any]:
    """Returns how the samples were drawn, for JSON; of a folder, what is known of all its files."""
    drawn: dict[str, Any] = {"nfe": nfe, "n": options.samples()}
    if options.out_dir is None:
        assert sampler.report is not None
        drawn = dataclasses.asdict(sampler.report)
    else:
        there = read_settings(options.out_dir)
        drawn |= {"dtype": there.get("dtype"), "out_dir": str(options.out_dir)}
    drawn |= {**options.method_options(), **options.class_options()}
    if options.published is not None:
        drawn["published"] = options.published
    return {**drawn, "seed": options.seed, "start": options.start}


def measure_bits(options: EvaluateOptions) -> dict[str, Any]:
    """Runs --bpd; returns the figures for JSON. Ctrl-C ends it early, with `complete` false."""
    model = resolve_model(options.model)
    low, high = model_ends(model)
    _, device, _ = engines.pick("eager", options.device, model)
    if options.data is None and model.image_shape[0] != 1:
        raise ValueError("--bpd needs --data: the images whose likelihood is computed")
    if options.data is None:
        check_learnt_digits(options, model, "--data, the images whose likelihood is computed")
    source = options.data or "digits:held-out"
    skip = {"skip_damaged": options.skip_damaged, "progress": not options.quiet}
    images = open_source(source, model, options.background, **skip)
    n = len(images) - options.start if options.n is None else options.n
    if not 1 <= n <= len(images) - options.start:
        raise ValueError(
            f"{source} has {len(images)} images, too few for --n {n} from --start {options.start}"
        )
    for _ in datasets.read(images, range(options.start, options.start + n), SKIP):
        pass  # damaged images are found before hours of work
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rtol, atol = options.tolerances()
    settings = LikelihoodSettings(
        low, high, options.trace, options.n_probes, rtol, atol, options.seed
    )
    described = {"model": model.digest(), **describe_source(source, images)}
    described |= {**dataclasses.asdict(settings), "bits": BITS, "data_range": list(DATA_RANGE)}
    record = Record()
    if options.out_dir is not None:
        claim_folder(options.out_dir, described, "likelihoods computed")
        record = Record(options.out_dir / BITS_NAME)
    found = measure(
        model.to(device).score,
        images,
        range(options.start, options.start + n),
        settings,
        record,
        batch_size=options.batch_size or batch_size_for(n, model),
        device=device,
        progress=not options.quiet,
    )
    return {**found, **described, **CONVENTIONS, "start": options.start}


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def run(options: EvaluateOptions) -> int:
    """Does what the options say; exit code 0."""
    command.single_process("ncsn_fast.evaluate")
    check_outputs(options)
    check_source(options.data)
    if options.reference is not None and not is_statistics(options.reference):
        check_source(options.reference)
    figures, pictures = (measure_bits(options), []) if options.bpd else evaluate_samples(options)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.out is not None:
        write_or_keep(options.out, lambda path: _write_text(path, text + "\n"))
    for path, grid in pictures:
        write_or_keep(path, functools.partial(save_png, grid))
    if not figures.get("complete", True):
        raise KeyboardInterrupt
    return 0


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    return run(parse(args))
