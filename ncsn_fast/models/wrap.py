"""`ncsn_fast.wrap`: a ScoreModel of any network."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ncsn_fast.diffusion import schedule
from ncsn_fast.diffusion.parameterisation import (
    DiscreteVP,
    Parameterisation,
    Predicts,
    Process,
    Sees,
    standard,
)
from ncsn_fast.models.adapter import Adapter, WrappedConfig, forward_parameters, identity_of
from ncsn_fast.models.inputs import check_network
from ncsn_fast.models.score import ScoreModel

_EDM_ENDS = (0.002, 80.0)  # Karras et al. 2022, table 1, for data of standard deviation 0.5
_FIRST_TIME = 1e-3  # of a continuous process: where the published samplers end


def wrap(
    net: nn.Module,
    *,
    predicts: Predicts | Parameterisation,
    image_shape: Sequence[int],
    sees: Sees | None = None,
    process: Process | None = None,
    time_scale: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    sigma_data: float = 0.5,
    data_range: tuple[float, float] | None = (0.0, 1.0),
    n_sigmas: int | None = None,
    n_steps_each: int = 5,
    epsilon: float | None = None,
    n_classes: int = 0,
) -> ScoreModel:
    """Makes a ScoreModel of any network, for everything in this package that takes a model.

    Noise levels are given in the unit of the network's own data. Example, for a network
    net(x, log sigma) that was trained to predict the noise z in x = x_0 + sigma z, x_0 in [0, 1]:

        model = ncsn_fast.wrap(net, predicts="epsilon", sees="log_sigma", image_shape=(3, 32, 32),
                               sigma_min=0.01, sigma_max=50)
        images = ncsn_fast.Sampler(model).sample(16)

    Args:
        net: a module, called as net(x), net(x, c) or net(x, c, labels), with x (N, *image_shape)
            float32, c (N,) and labels (N,) int64. It returns a tensor of the shape of x, or an
            object with such a tensor as `sample`. It is put in evaluation mode, and not copied.
        predicts: what the output is: "score", "scaled_score" (the score times the standard
            deviation of the noise), "epsilon", "denoised", "v" or "edm"; or a Parameterisation,
            which says the rest too. See diffusion/parameterisation.py.
        image_shape: of one sample: (C, H, W) for images, (C, L), (C, D, H, W) or (D,) for others.
        sees: the second argument: "sigma", "log_sigma", "log_half_sigma" (log(sigma / 2)),
            "log_sigma/4" (a quarter of it), "time" (of the process, times time_scale), "timestep"
            (index of a DiscreteVP; whole and int64 if it is rounded), "level" (index in sigmas) or
            "nothing". None: "nothing" if forward has one parameter, EDM's for "edm".
        process: VP(), SubVP(), VE() or DiscreteVP(): what the network was trained on. None: the
            states x_0 + sigma z, whatever sigma is.
        sigma_min, sigma_max: ends of the noise levels. None: those of the process, or of EDM.
        sigmas: all of them, descending, instead.
        sigma_data: standard deviation of the network's data, for "edm".
        data_range: the range of the network's data that is [0, 1] in this package, such as (-1, 1);
            samples are clamped to it. None: data of any range, which are not clamped.
        n_sigmas: number of levels between the ends. None: what Technique 2 gives, 1000 at most,
            and at least so many that neighbours differ by 20 %.
        n_steps_each, epsilon: of annealed Langevin dynamics. None: Technique 4.
        n_classes: number of classes of a network with labels. If it takes the label n_classes too,
            that means no class; guidance needs it.

    Raises:
        TypeError, ValueError: something that cannot be inferred is missing, the parameters are not
            float32, or the network does not run, or returns another shape.
    """
    shape, parameters = _shape(image_shape), forward_parameters(check_network(net))
    if isinstance(predicts, Parameterisation):
        if sees is not None or process is not None:
            raise ValueError("a Parameterisation says what the network sees; give no sees, process")
        known = predicts
    else:
        sees = sees or _sees(parameters, predicts)
        known = standard(
            predicts,
            sees=sees,
            process=process,
            time_scale=time_scale,
            sigma_data=sigma_data,
            sigmas=tuple(map(float, () if sigmas is None or sees != "level" else sigmas)),
            data_range=(0.0, 1.0) if data_range is None else data_range,
        )
    _check_call(parameters, known.c_noise is not None, n_classes)
    _check_dtype(net)
    if sigmas is None:
        ladder = _ladder(known, process, sigma_min, sigma_max, n_sigmas, math.prod(shape))
    elif sigma_min is None and sigma_max is None and n_sigmas is None:
        ladder = schedule.check_ladder(np.asarray(sigmas, dtype=np.float64))
    else:
        raise ValueError("sigmas are all noise levels; give no sigma_min, sigma_max or n_sigmas")
    ladder = ladder / known.data_scale
    config = WrappedConfig(
        arch=type(net).__name__,
        sample_shape=shape,
        parameterisation=known,
        n_sigmas=len(ladder),
        sigma_begin=float(ladder[0]),
        sigma_end=float(ladder[-1]),
        epsilon=schedule.usual_epsilon(ladder, n_steps_each) if epsilon is None else float(epsilon),
        n_steps_each=n_steps_each,
        n_classes=n_classes,
        bounded=data_range is not None,
        identity=identity_of(net),
    )
    model = wrapped(net, config, torch.from_numpy(ladder))
    with _noting_the_call(model):
        return check_runs(_checked(model))


@contextlib.contextmanager
def _noting_the_call(model: ScoreModel) -> Iterator[None]:
    """Adds to errors of a network with what it was called, once, on zeros."""
    try:
        yield
    except Exception as error:  # whatever it is: it is raised again
        u, condition = _probe(model)
        given = [("x", (1, *model.sample_shape), u.dtype)]
        if condition is not None:
            given.append(("the noise level", tuple(condition.shape), condition.dtype))
        if model.n_classes:
            given.append(("labels", (1,), torch.int64))
        error.add_note(
            "The network was called with "
            + ", ".join(f"{name} {shape} {dtype}" for name, shape, dtype in given)
            + ": if it takes others, give wrap another image_shape, sees or n_classes."
        )
        raise


def wrapped(net: nn.Module, config: WrappedConfig, sigmas: Tensor) -> ScoreModel:
    """Returns the model of a network and its description, on the network's device."""
    adapter = Adapter(
        net,
        config.sample_shape,
        conditioned=config.parameterisation.c_noise is not None,
        labelled=config.n_classes > 0,
    )
    model = ScoreModel(config, sigmas, adapter).eval()
    model.sigmas = model.sigmas.to(next((p.device for p in net.parameters()), sigmas.device))
    return model


def check_runs(model: ScoreModel) -> ScoreModel:
    """Runs the network once, on zeros; returns the model.

    Errors of the network itself come through. TypeError or ValueError for an output that is not
    floating point, of the shape of the input.
    """
    with torch.no_grad():
        f = model(*_probe(model))
    if not f.is_floating_point():
        raise TypeError(f"a network must return floating-point numbers; got {f.dtype}")
    return model


def _check_timesteps(model: ScoreModel) -> ScoreModel:
    """Returns the model; ValueError if its network takes whole timesteps only, as tables do."""
    process, (u, condition) = model.parameterisation.process, _probe(model)
    whole = condition is None or condition.dtype == torch.int64
    if model.conditioning != "timestep" or not isinstance(process, DiscreteVP) or whole:
        return model
    assert condition is not None
    with torch.no_grad():
        try:
            model(u, condition)
        except (RuntimeError, IndexError):
            try:
                model(u, condition.long())
            except (RuntimeError, IndexError):
                return model  # it fails for another reason, which is told where it is run again
            raise ValueError(
                f"the network takes whole timesteps only: give process="
                f"{dataclasses.replace(process, rounded=True)}"
            ) from None
    return model


def _checked(model: ScoreModel) -> ScoreModel:
    """Returns the model, after what can be said of its network by running it."""
    return _saying_classes(_check_timesteps(model))


def _saying_classes(model: ScoreModel) -> ScoreModel:
    """Returns the model, whose description says whether the network takes the label of no class.

    A network that does not fails as an embedding or one-hot rows do.
    """
    u, condition = _probe(model)
    try:
        with torch.no_grad():
            model(u, condition)
    except (IndexError, RuntimeError):
        if model.n_classes == 0:
            raise
        assert isinstance(model.config, WrappedConfig)
        model.config = dataclasses.replace(model.config, no_class=False)
    return model


def _probe(model: ScoreModel) -> tuple[Tensor, Tensor | None]:
    """Returns arguments of the network: an image of zeros, and its condition."""
    u = torch.zeros(1, *model.image_shape, device=model.device)
    return u, model.condition(model.sigmas[-1:])


def _shape(image_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(n) for n in image_shape)
    if not shape or min(shape) < 1 or any(n != m for n, m in zip(shape, image_shape, strict=True)):
        raise ValueError(
            "image_shape must be the shape of one sample, (C, H, W) for images; got "
            f"{tuple(image_shape)}"
        )
    return shape


def _sees(parameters: list[inspect.Parameter], predicts: str) -> Sees | None:
    """Returns what the network sees if that is certain; None leaves it to EDM's own choice."""
    needed = [p for p in parameters if p.default is p.empty]
    if len(parameters) == 1:
        return "nothing"
    if predicts == "edm":
        return None
    second = parameters[1].name if len(parameters) > 1 else ""
    if len(needed) > 1 or len(parameters) > 1:
        raise ValueError(
            f"forward has a second parameter {second!r}: say what it is, sees='sigma', "
            "'log_sigma', 'time' (give process, too), 'timestep', 'level' (give sigmas, too) or "
            "'nothing'"
        )
    return "nothing"


def _check_call(parameters: list[inspect.Parameter], conditioned: bool, n_classes: int) -> None:
    passed = 1 + conditioned + (n_classes > 0)
    needed = sum(p.default is p.empty for p in parameters)
    names = ", ".join(p.name for p in parameters)
    if parameters and not needed <= passed <= len(parameters):
        what = ["x", *(["the noise level"] if conditioned else []), *(["labels"] * (n_classes > 0))]
        raise ValueError(
            f"forward({names}) would be called with {', '.join(what)}; wrap it in a module that "
            "takes these, or give another sees or n_classes"
        )
    if n_classes > 0 and not conditioned:
        raise ValueError("a network with labels is called as net(x, c, labels): give sees")


def _check_dtype(net: nn.Module) -> None:
    for name, p in net.named_parameters():
        if p.is_floating_point() and p.dtype != torch.float32:
            raise ValueError(
                f"parameters must be float32, and engines convert them; {name} is {p.dtype}: call "
                "net.float()"
            )


def _ladder(
    known: Parameterisation,
    process: Process | None,
    sigma_min: float | None,
    sigma_max: float | None,
    n_sigmas: int | None,
    dim: int,
) -> np.ndarray:
    """Returns the noise levels in the network's unit, descending."""
    low, high = _ends(known, process)
    low, high = sigma_min or low, sigma_max or high
    if low is None or high is None:
        missing = [n for n, v in (("sigma_min", low), ("sigma_max", high)) if v is None]
        raise ValueError(
            f"give {' and '.join(missing)}, the ends of the noise levels that the network was "
            "trained on, in the unit of its data; they are known without being given for "
            "predicts='edm' and for a process"
        )
    if high > known.largest * (1 + 1e-6):
        raise ValueError(
            f"sigma_max must be at most {known.largest:.6g}, the last noise of the process; got "
            f"{high:g}"
        )
    if n_sigmas is None:
        n_sigmas = schedule.usual_n_sigmas(high, low, dim)
    return schedule.geometric(high, low, n_sigmas).double().numpy()


def _ends(known: Parameterisation, process: Process | None) -> tuple[float | None, float | None]:
    if isinstance(process, DiscreteVP):
        return float(process.sigmas[0]), float(process.sigmas[-1])
    if process is not None:
        return float(process.noise_level(_FIRST_TIME)), float(process.noise_level(1.0))
    if known.spec is not None and known.spec["predicts"] == "edm":
        return _EDM_ENDS
    return None, None


__all__ = ["wrap"]
