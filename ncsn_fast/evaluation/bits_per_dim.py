"""Log-likelihoods of images under a model, batch by batch, and their running mean.

8-bit images are dequantised (evaluation/likelihood.py), so that bits per dimension bound the code
length of the original levels; float images are evaluated as they are.

The flow of any network is a normalised density, so its bits bound a code length whether or not the
network is a score. With exact scores, the density is that of the data smoothed by sigma_min,
nowhere above (2 pi sigma_min^2)^(-D/2), so bits per dimension are at least
log2(sigma_min sqrt(2 pi)) + 8: 2.68 at sigma_min = 0.01.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ncsn_fast.data import datasets, limits
from ncsn_fast.data.files import atomic_write, open_regular
from ncsn_fast.data.images import as_tensor, check_range
from ncsn_fast.data.json_file import parse_json
from ncsn_fast.diffusion.sde import VP
from ncsn_fast.engines.batch_sizes import default_batch_size
from ncsn_fast.evaluation.likelihood import Likelihood, Trace, dequantise, log_likelihood
from ncsn_fast.inference.runner import SamplingError
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops import noise
from ncsn_fast.samplers.procedure import Score, SolverError
from ncsn_fast.samplers.vp import T_END

T_FIRST = 1e-5  # least time of the published VP networks' training
BITS, DATA_RANGE = 8, (0.0, 1.0)  # of images as this package reads them
MAX_BATCH_SIZE = 64  # images per batch; gradients take memory, too


def model_ends(model: ScoreModel) -> tuple[float, float]:
    """Returns sigma_min and sigma_max of the model's probability flow.

    These are the ends of its noise levels or, if it is conditioned on time, the noise at the ends
    of the times that it was trained on. For VP and sub-VP networks the first of them is 1e-5, while
    their levels end where samplers do; the flow of x_t / m is that of a VE model, whose prior is
    N(0, sigma_max^2) too.

    Raises:
        ValueError: the network is only defined at its discrete levels.
    """
    if model.conditioning == "level":
        raise ValueError(
            f"this {model.config.arch} knows the score at its {model.config.n_sigmas} "
            "levels and nowhere between them, so it has no probability flow and no likelihood; "
            "take an NCSNv2 or a network that is conditioned on time"
        )
    if model.clock is not None:
        return float(model.clock.std(model.clock.t_min)), float(model.clock.std(1.0))
    low, high, known = float(model.sigmas[-1]), float(model.sigmas[0]), model.parameterisation
    if isinstance(known.process, VP):
        sampled, first = (known.process.noise_level(t) / known.data_scale for t in (T_END, T_FIRST))
        low = float(first) if math.isclose(low, sampled, rel_tol=1e-5) else low
    return low, high


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
    """Settings that determine a likelihood, besides the images and the model.

    Attributes:
        sigma_min, sigma_max: ends of the flow.
        trace, n_probes, rtol, atol: see likelihood.log_likelihood.   seed: of all noise.
    """

    sigma_min: float
    sigma_max: float
    trace: Trace = "rademacher"
    n_probes: int = 1
    rtol: float = 1e-5
    atol: float = 1e-5
    seed: int = 0


def image_log_likelihood(
    model: ScoreModel,
    images: Any,
    *,
    seed: int = 0,
    start: int = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    trace: Trace = "rademacher",
    n_probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Likelihood:
    """Computes the likelihood of images under a model; fields (N, ...) on the CPU.

    Args:
        images: uint8 tensor (N, C, H, W), uint8 array (N, H, W, C) or PIL images, which are
            dequantised; or a float tensor (N, C, H, W), evaluated as it is: density in units of
            [0, 1], and bits for 8-bit levels.
        seed, start: keys of the dequantisation and of the probes: image i is sample start + i, and
            its likelihood does not depend on its neighbours.
        sigma_min, sigma_max: ends of the flow; None for the model's (`model_ends`).
        trace, n_probes, rtol, atol: see likelihood.log_likelihood.
        batch_size: images at once; None for a size that fits them.
        device: where to compute, with a copy of the model if it is elsewhere; None for the model's.

    Raises:
        ValueError: unsuitable images, or a model without a probability flow (NCSN 2019).
        SamplingError: the flow of an image cannot be followed; the message says which.
    """
    low, high = model_ends(model)
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    x = as_tensor(images, model.image_shape)
    check_range(x)
    samples = noise.sample_indices(start, len(x))
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        levels = (x * 255).round().to(torch.uint8)
        x = dequantise(levels, bits=BITS, data_range=DATA_RANGE, seed=seed, samples=samples)
    place = model.device if device is None else torch.device(device)
    if place.type != model.device.type or place.index not in (None, model.device.index):
        model = copy.deepcopy(model).to(place).eval()
    size = batch_size_for(len(x), model) if batch_size is None else batch_size
    _check_batch_size(size)
    settings = LikelihoodSettings(low, high, trace, n_probes, rtol, atol, seed)
    parts = zip(x.split(size), samples.split(size), strict=True)
    found = [_likelihood(model.score, *part, settings, model.device, start) for part in parts]
    fields = [f.name for f in dataclasses.fields(Likelihood)]
    return Likelihood(**{k: torch.cat([getattr(part, k).cpu() for part in found]) for k in fields})


def batch_size_for(n: int, model: ScoreModel) -> int:
    """Returns the default number of images per batch."""
    return min(MAX_BATCH_SIZE, default_batch_size(n, model.image_shape, model.device))


def _check_batch_size(size: int) -> None:
    noise.check_integer("batch_size", size, least=1)


def _likelihood(
    score: Score,
    x: Tensor,
    keys: Tensor,
    settings: LikelihoodSettings,
    device: torch.device | str,
    start: int = 0,
) -> Likelihood:
    """Computes the likelihood of one batch (B, C, H, W); errors name the image key - start."""
    options = dataclasses.asdict(settings)
    ends = options.pop("sigma_min"), options.pop("sigma_max")
    options |= {"samples": keys.to(device), "bits": BITS, "data_range": DATA_RANGE}
    try:
        return log_likelihood(score, x.to(device), *ends, **options)
    except SolverError as error:
        raise SamplingError(
            f"no likelihood of image {int(keys[error.row]) - start} with rtol {settings.rtol:g} "
            f"and atol {settings.atol:g}: {error}"
        ) from error


def bits_per_dimension(
    score: Score,
    images: datasets.Images,
    indices: Sequence[int],
    settings: LikelihoodSettings,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[list[int], Likelihood]]:
    """Yields (indices, Likelihood) of each batch of a data set's 8-bit images, in order.

    Image i is sample i of the seed, so that its value depends on no other image, up to rounding.

    Args:
        score: (x, sigma (B,)) -> score of images in [0, 1], differentiable in x.
        indices: which images.

    Raises:
        SamplingError: the flow of an image cannot be followed; the message says which.
    """
    _check_batch_size(batch_size)
    for first in range(0, len(indices), batch_size):
        part = list(indices[first : first + batch_size])
        keys = torch.tensor(part, dtype=torch.int64)
        levels = datasets.stack(images, part)
        x = dequantise(levels, bits=BITS, data_range=DATA_RANGE, seed=settings.seed, samples=keys)
        yield part, _likelihood(score, x, keys, settings, device)


class Record:
    """Likelihoods of the images of a data set, in memory and optionally as JSON lines in a file.

    Attributes:
        found: image index -> {"index", "bpd", "nfe"}.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.found = path, dict[int, dict[str, Any]]()
        if path is None or not path.exists():
            return
        with open_regular(path, limits.RECORD_BYTES) as file:
            written = file.read()
        for line in written.splitlines():
            try:
                entry = _entry(line)
            except ValueError:
                continue  # a truncated line of a killed process: redo that image
            self.found[entry["index"]] = entry
        if written != (text := "".join(map(_line, self.found.values()))).encode():
            with atomic_write(path) as temporary:
                temporary.write_text(text)

    def add(self, indices: list[int], likelihood: Likelihood) -> None:
        """Adds a batch."""
        values = zip(indices, likelihood.bpd.tolist(), likelihood.nfe.tolist(), strict=True)
        new = [{"index": i, "bpd": bpd, "nfe": nfe} for i, bpd, nfe in values]
        self.found |= {entry["index"]: entry for entry in new}
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write("".join(map(_line, new)))

    def figures(self, indices: Sequence[int]) -> dict[str, Any]:
        """Returns means over those of `indices` that are recorded, for JSON.

        bpd: mean, its standard error s / sqrt(n), and n.   nfe: mean network evaluations per image.
        (None: not enough images.)
        """
        rows = [self.found[i] for i in indices if i in self.found]
        bpd, nfe = (
            torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in ("bpd", "nfe")
        )
        n = len(rows)
        return {
            "bpd": {
                "mean": float(bpd.mean()) if n else None,
                "standard_error": float(bpd.std() / math.sqrt(n)) if n > 1 else None,
                "n": n,
            },
            "nfe": float(nfe.mean()) if n else None,
        }


def _entry(line: bytes) -> dict[str, Any]:
    """A line of a record; ValueError unless it is one."""
    values = parse_json(line.decode(), "line")
    index, bpd, nfe = (values.get(key) for key in ("index", "bpd", "nfe"))
    if type(index) is not int or index < 0 or type(bpd) is not float or type(nfe) is not int:
        raise ValueError(f"expected index, bpd and nfe; got {values}")
    return {"index": index, "bpd": bpd, "nfe": nfe}


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def measure(
    score: Score,
    images: datasets.Images,
    indices: Sequence[int],
    settings: LikelihoodSettings,
    record: Record,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Completes a record for these images; returns its figures, those by class, and `complete`.

    Ctrl-C ends it early: finished images are in the record, and `complete` is false.
    """
    todo, complete = [i for i in indices if i not in record.found], True
    stream = bits_per_dimension(score, images, todo, settings, batch_size=batch_size, device=device)
    with tqdm(
        total=len(indices), initial=len(indices) - len(todo), unit="image", disable=not progress,
        dynamic_ncols=True,
    ) as bar:  # fmt: skip
        try:
            for part, likelihood in stream:
                record.add(part, likelihood)
                bar.set_postfix_str(_shown(record.figures(indices)["bpd"]), refresh=False)
                bar.update(len(part))
        except KeyboardInterrupt:
            complete = False
    classes = figures_by_class(record, images, indices)
    return {**record.figures(indices), **classes, "complete": complete}


def figures_by_class(
    record: Record, images: datasets.Images, indices: Sequence[int]
) -> dict[str, Any]:
    """Returns `bpd_by_class`, as Record.figures for the images of each class; {} without labels."""
    if images.labels is None:
        return {}
    members: dict[str, list[int]] = {name: [] for name in images.classes}
    for index in indices:
        members[images.classes[int(images.labels[index])]].append(index)
    found = {name: record.figures(chosen)["bpd"] for name, chosen in members.items()}
    return {"bpd_by_class": {name: bpd for name, bpd in found.items() if bpd["n"]}}


def _shown(bpd: dict[str, Any]) -> str:
    """Formats mean and standard error."""
    if bpd["mean"] is None:
        return "no image"
    error = bpd["standard_error"]
    return f"bits/dim {bpd['mean']:.4f}" + ("" if error is None else f" ± {error:.4f}")
