"""Editing: inpainting, restoration, variation, guidance and interpolation of images.

Each function checks its arguments and returns an `Edit`: a Program or Procedure, a job for the
runner, and a function for the images that it draws. The methods of Sampler run it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ncsn_fast.data.images import as_mask, as_tensor, check_output, check_range
from ncsn_fast.inference.runner import Job
from ncsn_fast.inference.sampling_params import SamplingCall
from ncsn_fast.models.inputs import each_sigma
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops.noise import Stream, check_uint32, normal
from ncsn_fast.samplers.guidance import (
    Both,
    Conditional,
    Gradient,
    Imposed,
    Projected,
    check_labels,
    classifier_gradient,
)
from ncsn_fast.samplers.operators import Grey, Mask, Operator, block_mean, gaussian_blur
from ncsn_fast.samplers.procedure import Guide, Procedure, check_guide
from ncsn_fast.samplers.program import Program
from ncsn_fast.samplers.program_transforms import (
    check_draws_noise,
    inpainting,
    interpolation_weights,
    start_level,
)

Inpainting = Literal["ncsnv2", "ncsn", "projected"]
Restoration = Literal["imposed", "projected"]
FITS, ROUNDS = 1e-6, 200  # tolerance of |A x - y|, and the largest number of projections


class Edit(NamedTuple):
    """Edit that is ready to run.

    Attributes:
        program: the sampler.   job: its chains, one per image.
        finish: function of the drawn images (N, C, H, W) in [0, 1], or None.
    """

    program: Program | Procedure
    job: Job
    finish: Callable[[Tensor], Tensor] | None = None


class Measured(NamedTuple):
    """Measurements y = A x of images x, float32 (N, ...), and the operator A."""

    y: Tensor
    operator: Operator


def as_states(model: ScoreModel, x: Tensor) -> Tensor:
    """Returns samples in the shape that callers see as states (N, C, H, W); others unchanged."""
    own = model.sample_shape
    if len(own) == 3 or tuple(x.shape[1:]) != own:
        return x
    return x.reshape(len(x), *model.image_shape)


def initial_states(model: ScoreModel, images: Any, n: int) -> Tensor:
    """Returns the states (n, C, H, W) that a user starts chains at."""
    given = as_states(model, images) if isinstance(images, Tensor) else images
    x = as_tensor(given, model.image_shape)
    if len(x) != n:
        raise ValueError(f"expected {n} images; got {len(x)}")
    return x


def inpaint(
    model: ScoreModel, images: Any, mask: Any, call: SamplingCall, variant: Inpainting | None
) -> Edit:
    """Draws unknown pixels; see `Sampler.inpaint`."""
    if variant is not None and variant not in get_args(Inpainting):
        raise ValueError(f"variant must be 'projected', 'ncsnv2' or 'ncsn'; got {variant!r}")
    known = as_tensor(images, model.image_shape)
    keep = as_mask(mask, known)
    program = call.build(model)
    if variant in ("ncsnv2", "ncsn") and not isinstance(program, Program):
        does = "imposes pixels after every update" if _imposes(program) else "imposes nothing"
        raise ValueError(
            f"method {call.method!r} {does}, so it has no variant {variant!r}; leave it out, or "
            "take 'projected'"
        )
    variant = variant or ("ncsnv2" if _imposes(program) else "projected")
    job = Job(call.samples(len(known)))
    if variant == "projected":
        job.guide = Projected(Mask(keep), known)
    else:
        job.mask, job.known = keep, known
        if isinstance(program, Program):
            program = inpainting(program, variant)
    check_output(call.output)
    return Edit(program, job, lambda x: torch.where(keep, known, x))


def restore(
    model: ScoreModel,
    measurements: Tensor,
    operator: Operator,
    call: SamplingCall,
    *,
    noise: float = 0.0,
    how: Restoration | None = None,
    guide: Guide | None = None,
) -> Edit:
    """Draws images that measure y = A x + noise z; see `Sampler.restore`."""
    if not isinstance(operator, Operator):
        raise TypeError(
            "operator must be one of samplers/operators.py, whose Linear takes any linear "
            f"function; got {type(operator).__name__}"
        )
    y = _check_measured(model, measurements, operator)
    check_guide(guide, len(y))
    program = call.build(model)
    how = how or ("imposed" if _imposes(program) and noise == 0 else "projected")
    job = Job(call.samples(len(y)), guide=guide)
    if how == "projected":
        projected = Projected(operator, y, noise)
        job.guide = projected if guide is None else Both(guide, projected)
    elif how == "imposed" and not _imposes(program):
        raise ValueError(f"method {call.method!r} imposes nothing; take how='projected'")
    elif how == "imposed" and noise == 0:
        job.constraint = Imposed(operator, y)
        if isinstance(program, Program):
            program = inpainting(program)
    else:
        raise ValueError(
            f"how must be 'projected' or, without noise, 'imposed'; got {how!r} and noise={noise}"
        )
    check_output(call.output)
    return Edit(program, job, (lambda x: fitted(x, operator, y)) if noise == 0 else None)


def grey_images(model: ScoreModel, images: Any, noise: float = 0.0) -> Measured:
    """Checks grey images (N, 1, H, W), means of the channels of a model's images."""
    operator = mean_of_colours(model)
    grey = as_tensor(images, (1, *model.image_shape[1:]))
    check_range(grey, noise)
    return Measured(grey, operator)


def mean_of_colours(model: ScoreModel) -> Grey:
    """Returns the operator that `colourise` inverts; ValueError unless images are RGB."""
    channels = model.image_shape[0]
    if channels != 3:
        raise ValueError(
            f"colourise needs a model of RGB images; this one's have {channels} channel"
            f"{'' if channels == 1 else 's'}"
        )
    return Grey()


def small_images(model: ScoreModel, images: Any, factor: int, noise: float = 0.0) -> Measured:
    """Checks images (N, C, H / factor, W / factor), means of blocks of pixels."""
    channels, height, width = model.image_shape
    operator = block_mean(factor, height, width)
    small = as_tensor(images, (channels, height // factor, width // factor))
    check_range(small, noise)
    return Measured(small, operator)


def blurred_images(model: ScoreModel, images: Any, blur: float, noise: float = 0.0) -> Measured:
    """Checks images (N, C, H, W), blurred by a Gaussian of standard deviation `blur` pixels."""
    operator = gaussian_blur(blur, *model.image_shape[1:])
    blurred = as_tensor(images, model.image_shape)
    check_range(blurred, noise)
    return Measured(blurred, operator)


def sdedit(
    model: ScoreModel,
    images: Any,
    call: SamplingCall,
    sigma: float | None,
    strength: float | None,
) -> Edit:
    """Adds noise to images and samples from there; see `Sampler.sdedit`."""
    x = as_tensor(images, model.image_shape)
    check_range(x)
    level = start_level(model.sigmas.double().numpy(force=True), sigma, strength)
    program = call.build(model, sigma_start=level)
    samples = call.samples(len(x))
    check_uint32("seed", call.seed)
    z = normal(call.seed, samples, Stream.INITIAL, 0, tuple(x.shape[1:]))
    return Edit(program, Job(samples, init=x + float(program.sigma[0]) * z))


def guided(
    model: ScoreModel,
    labels: Any,
    classifier: Callable[[Tensor, Tensor], Tensor] | None,
    call: SamplingCall,
    *,
    gradient: Gradient | None,
    scale: float,
    device: torch.device,
) -> Edit:
    """Draws samples of given classes, with a classifier on a device; see `Sampler.guided`."""
    if (classifier is None) == (gradient is None):
        raise ValueError("give either a classifier or a gradient")
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels must be integers (N,); got {labels!r:.60}") from error
    if labels.ndim == 0:
        raise ValueError("labels must be (N,), one per sample; got one number")
    if classifier is not None:
        check_labels(labels, classifier, model.image_shape, device)
        gradient = classifier_gradient(classifier)
    assert gradient is not None
    program = call.build(model)
    guide = Conditional(gradient, labels, scale)
    return Edit(program, Job(call.samples(len(labels)), guide=guide))


def interpolate(model: ScoreModel, n_pairs: int, n_frames: int, call: SamplingCall) -> Edit:
    """Draws frames between pairs of samples; see `Sampler.interpolate`."""
    program = call.build(model)
    check_draws_noise(program)
    weights, rows = interpolation_weights(n_frames), call.samples(n_pairs)
    return Edit(
        program, Job(rows.repeat_interleave(n_frames), noise_weights=weights.repeat(n_pairs, 1))
    )


def denoise(
    model: ScoreModel,
    images: Any,
    sigma: Tensor | float,
    score: Callable[[Tensor, Tensor | float], Tensor],
) -> Tensor:
    """Returns the posterior mean x + sigma^2 score(x, sigma) of noisy images, in [0, 1]."""
    x = as_tensor(images, model.image_shape)
    sigmas = each_sigma(sigma, x)
    check_range(x, float(sigmas.max()) if len(x) else 0.0)
    square = sigmas.square()[:, None, None, None]
    return (x + square * score(x, sigma)).clamp(0, 1)


def fitted(x: Tensor, operator: Operator, y: Tensor) -> Tensor:
    """Returns images (N, C, H, W) in [0, 1] with A x = y, near x; each depends on its own row only.

    Alternating projections onto {x: A x = y} and onto [0, 1]. If the two do not meet, the result
    lies between them.
    """
    for _ in range(ROUNDS):
        off = (operator.apply(x) - y).abs().flatten(1).amax(1) > FITS if len(x) else x.new_zeros(0)
        if not bool(off.any()):
            break
        x = torch.where(off[:, None, None, None], operator.correct(x, y).clamp(0, 1), x)
    return x


def _imposes(program: Program | Procedure) -> bool:
    """Returns whether a sampler can impose known pixels or measurements while it runs."""
    return isinstance(program, Program) or program.constrains


def _check_measured(model: ScoreModel, measurements: Tensor, operator: Operator) -> Tensor:
    """Returns measurements as float32 on the CPU; ValueError unless they fit the operator."""
    y = torch.as_tensor(measurements).detach().to("cpu", torch.float32)
    n, shape = len(y) if y.ndim else 0, model.image_shape
    try:
        expected = tuple(operator.apply(torch.zeros(1, *shape).expand(n, -1, -1, -1)).shape)
    except RuntimeError as error:
        raise ValueError(f"the operator does not take {n} images {shape}: {error}") from error
    if tuple(y.shape) != expected:
        raise ValueError(f"measurements must be {expected}; got {tuple(y.shape)}")
    if not bool(torch.isfinite(y).all()):
        raise ValueError("measurements hold NaN or infinite values")
    return y
