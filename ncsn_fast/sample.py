"""`python -m ncsn_fast.sample`: draws samples into a grid, or into one file each."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from ncsn_fast import cli, noise
from ncsn_fast.images import sample_path, save_grid, save_png, to_uint8
from ncsn_fast.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """Options that every command which samples has."""

    model: str | None = None
    """Run folder, model folder or published .pth; without it the newest run below ./runs, else the
    shipped model."""
    engine: str = "auto"
    """Engine; `python -m ncsn_fast.doctor` lists them."""
    dtype: str | None = None
    """Type the network computes in: fp32 or bf16."""
    device: str | None = None
    """cpu, cuda or cuda:N; without it a GPU if there is one."""
    batch_size: int | None = None
    """Images in a micro-batch."""
    threads: int | None = None
    """CPU threads."""
    seed: int = 0
    """Seed of all noise."""
    start: int = 0
    """Index of the first sample."""
    method: str = "ald"
    """Sampling method: ald or cas."""
    steps: int | None = None
    """Noise levels; without it the model's own ladder."""
    n_steps_each: int | None = None
    """Langevin steps per level (ald)."""
    epsilon: float | None = None
    """Langevin step size (the published step_lr)."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress bar."""

    def sampler(self) -> Sampler:
        return Sampler(
            self.model,
            engine=self.engine,
            dtype=self.dtype,
            device=self.device,
            batch_size=self.batch_size,
            threads=self.threads,
        )

    def method_options(self) -> dict[str, Any]:
        """Keyword arguments for the sampler's methods; only what was given."""
        options: dict[str, Any] = {"method": self.method, "steps": self.steps}
        for name in ("n_steps_each", "epsilon"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        return options


@dataclasses.dataclass(frozen=True)
class SampleOptions(SamplerOptions):
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


def write_files(sampler: Sampler, options: SampleOptions, folder: Path) -> int:
    """Draws the samples whose files are missing, one PNG each; returns how many were written."""
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


def main(args: list[str] | None = None) -> int:
    """Command line; exit code 0."""
    options = cli.parse(SampleOptions, args, "ncsn_fast.sample", "Draw samples from a model.")
    if options.n < 1:
        raise cli.UsageError(f"--n must be at least 1; got {options.n}")
    sampler = options.sampler()
    if options.plan:
        print(sampler.plan(options.n, **options.method_options()))
        return 0
    if options.out_dir is not None:
        written = write_files(sampler, options, options.out_dir)
        print(f"{written} samples written, {options.n - written} were there: {options.out_dir}")
        if options.out is None:
            return 0
    images = sampler.sample(
        options.n,
        seed=options.seed,
        start=options.start,
        progress=not options.quiet,
        **options.method_options(),
    )
    path = options.out or Path("samples.png")
    save_grid(images, path, options.columns)
    report = sampler.report
    assert report is not None
    print(
        f"{path}: {report.n} samples, {report.nfe} network evaluations each ({report.method}), "
        f"{report.seconds:.1f} s, engine {report.engine} {report.dtype}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
