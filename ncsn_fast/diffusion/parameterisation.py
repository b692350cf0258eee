"""Parameterisation: what a network predicts, as four functions of the noise level.

With x = x_0 + sigma z, every network F here gives a denoised image (Karras et al. 2022,
"Elucidating the design space of diffusion-based generative models", equation 7 and table 1):

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)        score = (D - x) / sigma^2

A network that was trained on states x_t = m x_0 + s z, as those of VP-SDEs are, sees x = x_t / m,
with sigma = s / m; m(sigma) is 1 / sqrt(1 + sigma^2) for VP. In these terms:

    predicts      F                             c_skip                c_out               c_in
    score         grad log p(x_t)               1                     m sigma^2           m
    scaled_score  s grad log p(x_t)             1                     sigma               m
    epsilon       z                             1                     -sigma              m
    denoised      x_0                           0                     1                   m
    v             m z - s x_0 (VP only)         m^2                   -m sigma            m
    edm           see the paper                 d^2 / (sigma^2+d^2)   sigma d c_in        see below

d is the standard deviation of the data, and EDM's c_in = 1 / sqrt(sigma^2 + d^2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn_fast.diffusion.sde import SDE, VE, VP, SubVP
from ncsn_fast.names import suggestion

Predicts = Literal["score", "scaled_score", "epsilon", "denoised", "v", "edm"]
Sees = Literal[
    "nothing", "sigma", "log_sigma", "log_half_sigma", "log_sigma/4", "time", "timestep", "level"
]
Function = Callable[[Tensor], Tensor]  # of noise levels in float64, of the same shape


class LinearForm(NamedTuple):
    """sigma score(x) = skip x + out F(scale x + shift, c_noise) + const, at K noise levels.

    All are (K,) float64, of PyTorch or, after `numpy`, of NumPy.
    """

    skip: Any
    out: Any
    const: Any
    scale: Any
    shift: Any

    def numpy(self) -> LinearForm:
        """Returns the same in NumPy."""
        return LinearForm(*(column.cpu().numpy() for column in self))


@dataclasses.dataclass(frozen=True, eq=False)
class Parameterisation:
    """Four functions of the noise level that make a denoiser of a network; see the module.

    Args:
        c_skip, c_out, c_in: from noise levels (K,) float64, in the unit of the data that the
            network was trained on, to (K,) float64.
        c_noise: the same, to the network's second input; None for a network without one.
        slope: (c_skip - 1) / sigma, computed without cancellation; None if c_skip gives it.
        noise_dtype: dtype of that input, float32 or int64.
        data_scale, data_shift: the network's data are data_scale x + data_shift for the x of this
            package; (2, -1) for a network trained on images in [-1, 1].
        largest: the largest noise level that the network knows, in the network's unit.
        spec: the arguments of `standard`, for files; None for other functions.
    """

    c_skip: Function
    c_out: Function
    c_in: Function
    c_noise: Function | None = None
    slope: Function | None = None
    noise_dtype: torch.dtype = torch.float32
    data_scale: float = 1.0
    data_shift: float = 0.0
    largest: float = math.inf
    spec: Mapping[str, Any] | None = None

    def linear_form(self, sigma: Tensor, dtype: torch.dtype = torch.float64) -> LinearForm:
        """Returns sigma score as a linear form of x and the network's output, computed in dtype.

        sigma (K,) is in the unit of x. With u = data_scale x + data_shift, whose noise level is
        s = data_scale sigma, sigma grad log p(x) = s grad log p(u) = (D(u) - u) / s.
        """
        s = self.data_scale * sigma.to(dtype)
        skip = (self.c_skip(s) - 1) / s if self.slope is None else self.slope(s)
        out, inner = self.c_out(s) / s, self.c_in(s)
        return LinearForm(
            skip * self.data_scale,
            out,
            skip * self.data_shift,
            inner * self.data_scale,
            inner * self.data_shift,
        )

    def condition(self, sigma: Tensor, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """Returns the network's second input at noise levels sigma, in the unit of x.

        It is computed in dtype, and then rounded to that of the network.
        """
        if self.c_noise is None:
            return None
        return self.c_noise(self.data_scale * sigma.to(dtype)).to(self.noise_dtype)

    @property
    def process(self) -> Process | None:
        """The states that a network of `standard` was trained on, and its time; None for others."""
        return getattr(self.c_noise, "process", None)

    def nearest_levels(self, sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the level that a network knows nearest to each of sigmas (K,), in the unit of x.

        They are sigmas themselves, for most. One that gets the nearest index of a discrete chain
        knows the levels of the chain (EDM's `round_sigma`).
        """
        process = self.process
        if not (isinstance(process, DiscreteVP) and process.rounded):
            return sigmas
        indices = process.time(self.data_scale * sigmas).astype(np.int64)
        return process.sigmas[indices] / self.data_scale

    def known_levels(self, sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns `nearest_levels` of descending sigmas (K,), each once."""
        nearest = self.nearest_levels(sigmas)
        return nearest if nearest is sigmas else np.unique(nearest)[::-1].copy()

    @property
    def sigma_limit(self) -> float:
        """The largest noise level that the network knows, in the unit of x."""
        return self.largest / self.data_scale


class Process(Protocol):
    """Mapping between the noise level sigma = s / m and a network's own time."""

    def time(self, noise_level: Any) -> Any:
        """Computes the time of a noise level."""

    def noise_level(self, t: Any) -> Any:
        """Computes the noise level sigma at a time."""


@dataclasses.dataclass(frozen=True)
class DiscreteVP:
    """Discrete VP chain of DDPM (Ho et al. 2020): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z.

    abar_t is the product of 1 - beta_i for i = 0 .. t, with t an index from 0 to n - 1. Between two
    indices, t is linear in log sigma.

    Args:
        betas: "linear" between the ends; "scaled_linear", whose square root is linear; "cosine"
            (Nichol and Dhariwal 2021), which ignores the ends and limits beta to 0.999.
        rounded: whether the network knows whole indices only, and gets the nearest, int64.
    """

    n: int = 1000
    beta_begin: float = 1e-4
    beta_end: float = 0.02
    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"
    rounded: bool = False

    def __post_init__(self) -> None:
        if self.betas not in ("linear", "scaled_linear", "cosine"):
            raise ValueError(
                f"betas must be 'linear', 'scaled_linear' or 'cosine'; got {self.betas!r}"
            )
        if not (self.n >= 2 and 0 < self.beta_begin <= self.beta_end < 1):
            raise ValueError(
                "expected n >= 2 and 0 < beta_begin <= beta_end < 1; got "
                f"{self.n}, {self.beta_begin} and {self.beta_end}"
            )

    @functools.cached_property
    def sigmas(self) -> NDArray[np.float64]:
        """Noise level at each index, (n,) ascending."""
        ends = (self.beta_begin, self.beta_end)
        if self.betas == "linear":
            beta = np.linspace(*ends, self.n)
        elif self.betas == "scaled_linear":
            beta = np.linspace(ends[0] ** 0.5, ends[1] ** 0.5, self.n) ** 2
        else:
            t = np.arange(self.n + 1) / self.n
            level = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
            beta = np.minimum(1 - level[1:] / level[:-1], 0.999)
        loss = -np.cumsum(np.log1p(-beta))  # -log abar
        return np.sqrt(np.expm1(loss))

    def time(self, noise_level: Any) -> Any:
        """Computes the index of a noise level, between 0 and n - 1."""
        if not isinstance(noise_level, Tensor):
            return self.time(torch.as_tensor(noise_level, dtype=torch.float64)).numpy()
        known = torch.from_numpy(np.log(self.sigmas)).to(noise_level)
        wanted = noise_level.log()
        below = ((wanted[..., None] >= known).sum(dim=-1) - 1).clamp(0, self.n - 2)
        share = (wanted - known[below]) / (known[below + 1] - known[below])
        t = (below + share).clamp(0, self.n - 1)
        return t.round() if self.rounded else t

    def noise_level(self, t: Any) -> Any:
        """Computes the noise level at an index."""
        level = np.exp(np.interp(np.asarray(t), np.arange(self.n), np.log(self.sigmas)))
        return torch.from_numpy(np.asarray(level)) if isinstance(t, Tensor) else level


@dataclasses.dataclass(frozen=True)
class IDDPM(DiscreteVP):
    """Chain of EDM's iDDPMPrecond: the cosine chain in float32, whose rounding its networks know.

    A network gets the index of the nearest level, in sigma and not in log sigma.
    """

    betas: Literal["linear", "scaled_linear", "cosine"] = "cosine"
    rounded: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.betas != "cosine" or not self.rounded:
            raise ValueError("the chain of iDDPM has cosine betas, and is rounded")

    @functools.cached_property
    def sigmas(self) -> NDArray[np.float64]:
        j = torch.arange(self.n + 1)
        level = (0.5 * math.pi * j / self.n / 1.008).sin().square()
        ratio = (level[:-1] / level[1:]).clamp(min=0.001).numpy()
        sigma, found = np.float32(0), []
        for kept in ratio[::-1]:
            sigma = np.sqrt((sigma * sigma + np.float32(1)) / kept - np.float32(1))
            found.append(sigma)
        return np.array(found, dtype=np.float64)

    def time(self, noise_level: Any) -> Any:
        """Computes the index of the level that is nearest in sigma."""
        if not isinstance(noise_level, Tensor):
            return self.time(torch.as_tensor(noise_level, dtype=torch.float64)).numpy()
        known = torch.from_numpy(self.sigmas).to(noise_level)
        return (noise_level[..., None] - known).abs().argmin(dim=-1).to(noise_level.dtype)


PROCESSES: dict[str, type] = {
    "ve": VE, "vp": VP, "sub_vp": SubVP, "discrete_vp": DiscreteVP, "iddpm": IDDPM
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Standard:
    """The functions of `standard`, which must be objects that can be pickled."""

    predicts: Predicts
    process: Process | None
    sigma_data: float

    def mean_scale(self, sigma: Tensor) -> Tensor:
        """Computes m(sigma), with x_t = m x."""
        if self.process is None or isinstance(self.process, VE):
            return torch.ones_like(sigma)
        if isinstance(self.process, SubVP):
            return self.process.mean_scale(self.process.time(sigma))
        return (1 + sigma.square()).rsqrt()

    def c_skip(self, sigma: Tensor) -> Tensor:
        if self.predicts == "denoised":
            return torch.zeros_like(sigma)
        if self.predicts == "v":
            return self.mean_scale(sigma).square()
        if self.predicts == "edm":
            return self.sigma_data**2 * self.c_in(sigma).square()
        return torch.ones_like(sigma)

    def slope(self, sigma: Tensor) -> Tensor:
        """Computes (c_skip - 1) / sigma without cancellation."""
        if self.predicts == "denoised":
            return -1 / sigma
        if self.predicts == "v":  # m^2 (1 + sigma^2) = 1
            return -sigma * self.mean_scale(sigma).square()
        if self.predicts == "edm":
            return -sigma * self.c_in(sigma).square()
        return torch.zeros_like(sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        if self.predicts == "score":
            return sigma.square() * self.mean_scale(sigma)
        if self.predicts == "denoised":
            return torch.ones_like(sigma)
        if self.predicts == "v":
            return -sigma * self.mean_scale(sigma)
        if self.predicts == "edm":
            return sigma * self.sigma_data * self.c_in(sigma)
        return sigma.clone() if self.predicts == "scaled_score" else -sigma

    def c_in(self, sigma: Tensor) -> Tensor:
        if self.predicts == "edm":
            return (sigma.square() + self.sigma_data**2).rsqrt()
        return self.mean_scale(sigma)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """c_noise of a network that sees the noise level in one of the usual ways."""

    sees: Sees
    process: Process | None
    time_scale: float
    sigmas: tuple[float, ...]

    FUNCTIONS: ClassVar[dict[str, Function]] = {
        "sigma": torch.clone,
        "log_sigma": torch.log,
        "log_half_sigma": lambda sigma: (sigma / 2).log(),
        "log_sigma/4": lambda sigma: sigma.log() / 4,
    }

    def __call__(self, sigma: Tensor) -> Tensor:
        if self.sees in self.FUNCTIONS:
            return self.FUNCTIONS[self.sees](sigma)
        if self.sees == "level":
            known = torch.tensor(self.sigmas, dtype=sigma.dtype, device=sigma.device)
            return (sigma.log()[..., None] - known.log()).abs().argmin(dim=-1)
        assert self.process is not None
        t = self.process.time(sigma)
        return self.time_scale * (t.clamp(0, 1) if isinstance(self.process, SDE) else t)


def standard(
    predicts: Predicts,
    *,
    sees: Sees | None = None,
    process: Process | None = None,
    time_scale: float = 1.0,
    sigma_data: float = 0.5,
    sigmas: tuple[float, ...] = (),
    data_range: tuple[float, float] = (0.0, 1.0),
) -> Parameterisation:
    """Returns one of the usual parameterisations; see the module for their coefficients.

    Args:
        predicts: what the network's output is.
        sees: the network's second input: nothing; sigma, log sigma, log(sigma / 2) or log(sigma) /
            4, in the unit of the network's data; the process's time, times time_scale; the index
            "timestep" of a DiscreteVP; the index of the nearest "level" of `sigmas`. None:
            "log_sigma/4" for EDM.
        process: VE, VP, SubVP (diffusion/sde.py) or DiscreteVP: the states that the network was
            trained on, and its time. None: x = x_0 + sigma z.
        sigma_data: standard deviation of the network's data, for EDM.
        sigmas: the trained levels, descending, for "level", in the network's unit.
        data_range: the range of the network's data that is [0, 1] here, such as (-1, 1).

    Raises:
        ValueError: unknown names, or a choice that lacks what it needs.
    """
    sees = "log_sigma/4" if sees is None and predicts == "edm" else sees
    _check(predicts, sees, process, sigma_data, sigmas, data_range)
    assert sees is not None
    low, high = map(float, data_range)
    functions = _Standard(predicts, process, sigma_data)
    seen = None if sees == "nothing" else _Seen(sees, process, time_scale, tuple(sigmas))
    whole = sees == "timestep" and isinstance(process, DiscreteVP) and process.rounded
    spec = {
        "predicts": predicts,
        "sees": sees,
        "process": None if process is None else _process_to_dict(process),
        "time_scale": float(time_scale),
        "sigma_data": float(sigma_data),
        "sigmas": list(sigmas),
        "data_range": [low, high],
    }
    return Parameterisation(
        functions.c_skip,
        functions.c_out,
        functions.c_in,
        seen,
        functions.slope,
        torch.int64 if sees == "level" or whole else torch.float32,
        data_scale=high - low,
        data_shift=low,
        largest=math.inf if process is None or sees == "nothing" else _last_level(process),
        spec=spec,
    )


def _check(
    predicts: str,
    sees: str | None,
    process: Process | None,
    sigma_data: float,
    sigmas: tuple[float, ...],
    data_range: tuple[float, float],
) -> None:
    """Raises ValueError unless `standard` takes these arguments."""
    if predicts not in get_args(Predicts):
        raise ValueError(
            f"predicts must be one of {', '.join(get_args(Predicts))}, or a Parameterisation; got "
            f"{predicts!r}{suggestion(predicts, get_args(Predicts))}"
        )
    if sees is None or sees not in get_args(Sees):
        raise ValueError(
            f"sees must be one of {', '.join(get_args(Sees))}; got {sees!r}"
            f"{suggestion(sees, get_args(Sees))}"
        )
    if predicts == "v" and not isinstance(process, (VP, DiscreteVP)):
        raise ValueError("predicts='v' is of a VP process: give process=VP() or DiscreteVP()")
    if predicts == "v" and isinstance(process, SubVP):
        raise ValueError("predicts='v' is of a VP process; got a sub-VP one")
    if sees in ("time", "timestep") and process is None:
        raise ValueError(f"sees={sees!r} needs the process that has this time: give process=")
    if sees == "timestep" and not isinstance(process, DiscreteVP):
        raise ValueError("sees='timestep' is an index of a DiscreteVP process: give process=")
    if sees == "level" and not sigmas:
        raise ValueError("sees='level' is an index of the trained levels: give sigmas=")
    low, high = data_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"data_range must be two numbers, the lower first; got {data_range}")
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data must be positive; got {sigma_data}")


def from_spec(spec: Mapping[str, Any]) -> Parameterisation:
    """Returns the parameterisation that `standard` described in `spec`, read from a file.

    Raises ValueError or TypeError if it is none.
    """
    values = dict(spec)
    if values.get("process") is not None:
        fields = dict(values["process"])
        kind = fields.pop("kind", None)
        if kind not in PROCESSES:
            raise ValueError(f"process must be one of {', '.join(PROCESSES)}; got {kind!r}")
        values["process"] = PROCESSES[kind](**fields)
    for name in ("sigmas", "data_range"):
        values[name] = tuple(map(float, values.get(name, ())))
    return standard(values.pop("predicts"), **values)


def _process_to_dict(process: Process) -> dict[str, Any]:
    for kind, known in PROCESSES.items():
        if type(process) is known and dataclasses.is_dataclass(process):
            return {"kind": kind, **dataclasses.asdict(process)}
    raise ValueError(f"process must be a VE, VP, SubVP or DiscreteVP; got {type(process).__name__}")


def _last_level(process: Process) -> float:
    last = process.n - 1 if isinstance(process, DiscreteVP) else 1.0
    return float(process.noise_level(last))
