"""Program: a sampler as a table of coefficients, and the loop that runs it.

Every fixed-step sampler here is linear in its inputs, so it is data, one row per evaluation:
    f  = sigma_k * score(x, sigma_k)
    x' = a x + b f + g h + c z + e    z: standard normal of (seed, sample, stream 0, step k)
    h' = p x + q f + r                h: one history buffer, zero at first
Builders write tables with e = r = 0, except for VP chains (`reverse_sde.in_ve_form`). An engine
replaces f by the network's raw output (`Program.of_network`), which also says how the network's
input follows from x. Tables are float64 and can be checked against closed forms without a network.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.diffusion.parameterisation import LinearForm
from ncsn_fast.ops import addresses, reference
from ncsn_fast.ops.noise import Stream, check_uint32

Coefficients = tuple[float, ...]
Column = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Program:
    """Table of a sampler: K rows, one network evaluation each.

    Attributes:
        name: the method.
        sigma: (K,) noise level at which each row evaluates the score.
        level: (K,) int64, non-decreasing from 0: index of the noise level each row belongs to.
            Callbacks, progress and NaN checks happen between two levels.
        a, b, g, c, p, q, e, r: (K,) coefficients; b and q multiply f = sigma * score.
        scale, shift: (K,), the network's input at a row is scale x + shift.
        initial: initial distribution: "uniform" on [0, 1), or "prior", N(mean, sigma[0]^2).
        mean: mean of the prior, an image (C, H, W); None for 0.
        reference_noise: (K + 1,), for inpainting; None: the program cannot inpaint. Before row k
        known
            pixels become known + reference_noise[k] z, entry K is for after the last row; NaN: not
            at this point.
        reference_step: (K + 1,) int64 or None: the step index of that noise (stream 2).
    """

    name: str
    sigma: Column
    level: NDArray[np.int64]
    a: Column
    b: Column
    c: Column
    g: Column
    p: Column
    q: Column
    e: Column
    r: Column
    scale: Column
    shift: Column
    initial: Literal["uniform", "prior"] = "uniform"
    mean: Column | None = None
    reference_noise: Column | None = None
    reference_step: NDArray[np.int64] | None = None

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        return len(self.sigma)

    @property
    def has_history(self) -> bool:
        """Whether a row reads the history h."""
        return bool(np.any(self.g != 0))

    @property
    def draws_noise(self) -> bool:
        """Whether a row draws noise."""
        return bool(np.any(self.c != 0))

    def coefficients(self, k: int) -> Coefficients:
        """Returns (a, b, g, c, p, q, e, r) of row k."""
        return tuple(float(column[k]) for column in self._coefficients)

    @property
    def _coefficients(self) -> tuple[Column, ...]:
        return (self.a, self.b, self.g, self.c, self.p, self.q, self.e, self.r)

    def input(self, x: Tensor, k: int) -> Tensor:
        """Returns the network's input at row k, scale x + shift; x itself if they are 1 and 0."""
        scale, shift = float(self.scale[k]), float(self.shift[k])
        return x if (scale, shift) == (1.0, 0.0) else scale * x + shift

    @property
    def imposes(self) -> bool:
        """Whether known pixels are imposed anywhere."""
        return self.reference_noise is not None and not bool(np.isnan(self.reference_noise).all())

    def imposition(self, k: int) -> tuple[float, int]:
        """Returns scale and step of the noise on known pixels before row k (K: at the end)."""
        if self.reference_noise is None or self.reference_step is None:
            return math.nan, 0
        return float(self.reference_noise[k]), int(self.reference_step[k])

    def head(self, rows: int) -> Program:
        """Returns the program's first rows."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        columns: dict[str, Any] = {
            k: v[:rows] for k, v in fields.items() if isinstance(v, np.ndarray) and k != "mean"
        }
        for name in ("reference_noise", "reference_step"):
            if fields[name] is not None:
                columns[name] = fields[name][: rows + 1]
        return dataclasses.replace(self, **columns)

    def level_rows(self) -> Iterator[range]:
        """Yields the rows of each level, in order."""
        starts = [0, *(np.flatnonzero(np.diff(self.level)) + 1).tolist(), self.nfe]
        return (range(i, j) for i, j in itertools.pairwise(starts) if j > i)

    def of_network(self, network: LinearForm) -> Program:
        """Returns the program in terms of the raw output of a network, f = skip x + out F + const.

        The network's noise levels (K,) are those of the rows.
        """
        b, q = self.b, self.q
        return dataclasses.replace(
            self,
            a=self.a + b * network.skip,
            b=b * network.out,
            e=self.e + b * network.const,
            p=self.p + q * network.skip,
            q=q * network.out,
            r=self.r + q * network.const,
            scale=network.scale,
            shift=network.shift,
        )

    def numbers(self) -> tuple[Column, NDArray[np.int64]]:
        """Returns all rows as kernels read them, (K, 11) float64 and (K, 2) int64.

        Columns are a, b, g, c, p, q, e, r, then scale of the noise on pixels that become known, and
        scale and shift of the next row's input; step index of the noise, and of that on known
        pixels.
        """
        impositions = [self.imposition(k + 1) for k in range(self.nfe)]
        known = np.array([scale for scale, _ in impositions], dtype=np.float64)
        following = [np.append(column[1:], column[-1:]) for column in (self.scale, self.shift)]
        steps = np.array([(k, step) for k, (_, step) in enumerate(impositions)], dtype=np.int64)
        return (
            np.stack([*self._coefficients, known, *following], axis=1).astype(np.float64),
            steps.reshape(-1, 2),
        )


def table(
    name: str, sigma: Column, level: NDArray[np.integer], *, b: Column, c: Column, **columns: object
) -> Program:
    """Builds a Program with the usual defaults for omitted columns.

    a = scale = 1 and g = p = q = e = r = shift = 0.
    """
    k = len(sigma)
    ones: dict[str, object] = {name: np.ones(k) for name in ("a", "scale")}
    zeros = {name: np.zeros(k) for name in ("g", "p", "q", "e", "r", "shift")}
    values = {**ones, **zeros, **columns}
    return Program(name=name, sigma=sigma, level=level.astype(np.int64), b=b, c=c, **values)  # type: ignore[arg-type]


@dataclasses.dataclass
class Chains:
    """Micro-batch of Markov chains: their state, their noise key and their known pixels.

    Tensors are contiguous, on one device and of exactly these shapes, because kernels are given
    their addresses: nothing is broadcast.

    Attributes:
        x: state (B, C, H, W) float32; updated in place.
        seed, samples: noise of chain b is keyed by (seed, samples[b]); samples is (B,) int64, and
            both are below 2^32.
        noise_weights: (B, 2) float32, weights of streams 0 and 3, or None for (1, 0).
        mask, known: bool and float32, shape of x: mask and values of known pixels; or None.
        h: history buffer, float32, shape of x; updated in place.
        labels: (B,) int64, the classes of a network that takes them; None for no class.
        guidance: weight w of classifier-free guidance, F(no class) + w (F(class) - F(no class));
            None for F(class) alone.
        count: number of rows that are samples, the others being padding; None for all.
        nonfinite: (B,) int32, nonzero where x is not finite, from engines that detect it; else
            None.
    """

    x: Tensor
    seed: int
    samples: Tensor
    noise_weights: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    h: Tensor | None = None
    labels: Tensor | None = None
    guidance: float | None = None
    count: int | None = None
    nonfinite: Tensor | None = None

    def check(self, device: torch.device) -> None:
        """Raises TypeError or ValueError unless all fields are as said above, on the device.

        Looks at no values but the seed: nothing waits for a GPU.
        """
        check_uint32("seed", self.seed)
        if not isinstance(self.x, Tensor):
            raise TypeError(f"x must be a tensor; got {type(self.x).__name__}")
        if self.x.ndim != 4:
            raise ValueError(f"x must have shape (B, C, H, W); got {tuple(self.x.shape)}")
        shape, n = tuple(self.x.shape), len(self.x)
        if (self.mask is None) != (self.known is None):
            raise ValueError("mask and known come together; only one of them was given")
        fields: tuple[tuple[str, Tensor | None, tuple[int, ...], torch.dtype], ...] = (
            ("x", self.x, shape, torch.float32),
            ("samples", self.samples, (n,), torch.int64),
            ("noise_weights", self.noise_weights, (n, 2), torch.float32),
            ("mask", self.mask, shape, torch.bool),
            ("known", self.known, shape, torch.float32),
            ("h", self.h, shape, torch.float32),
            ("labels", self.labels, (n,), torch.int64),
            ("nonfinite", self.nonfinite, (n,), torch.int32),
        )
        for name, value, expected, dtype in fields:
            if value is not None or name == "samples":
                addresses.check(name, value, expected, dtype, device=device)
        if self.count is not None and not 0 <= self.count <= n:
            raise ValueError(f"count must be in 0 .. {n}; got {self.count}")


class Update(Protocol):
    """Application of a program's rows, noise included, in place."""

    def begin(self, chains: Chains, program: Program) -> None:
        """Prepares the chains before the first row."""

    def row(self, chains: Chains, f: Tensor, program: Program, k: int) -> None:
        """Applies row k, given the network output f."""


class FusedUpdate:
    """Update by the fused op, which generates the noise of ncsn_fast.ops.noise."""

    def begin(self, chains: Chains, program: Program) -> None:
        scale, step = program.imposition(0)
        if chains.mask is not None and chains.known is not None and not math.isnan(scale):
            shape = tuple(chains.x.shape[1:])
            z = ops.normal(chains.seed, chains.samples, Stream.REFERENCE, step, shape)
            chains.x.copy_(reference.impose_known(chains.x, chains.mask, chains.known, scale, z))

    def row(self, chains: Chains, f: Tensor, program: Program, k: int) -> None:
        c_ref, ref_step = program.imposition(k + 1)
        ops.sampler_update_(
            chains.x,
            f,
            chains.h,
            program.coefficients(k),
            seed=chains.seed,
            samples=chains.samples,
            step=k,
            noise_weights=chains.noise_weights,
            mask=chains.mask,
            known=chains.known,
            c_ref=c_ref,
            ref_step=ref_step,
        )


class InjectedNoise:
    """Update with noise from the caller, to reproduce another program's run draw by draw.

    Args:
        draw: (stream, step) -> standard normals, shape of x.
    """

    def __init__(self, draw: Callable[[Stream, int], Tensor]) -> None:
        self.draw = draw

    def begin(self, chains: Chains, program: Program) -> None:
        self._impose(chains, program, 0)

    def row(self, chains: Chains, f: Tensor, program: Program, k: int) -> None:
        coefficients = program.coefficients(k)
        z: Tensor | None = None
        if coefficients[3] != 0:
            z = self.draw(Stream.SAMPLER, k)
            if chains.noise_weights is not None:
                w = chains.noise_weights[:, :, None, None, None]
                z = w[:, 0] * z + w[:, 1] * self.draw(Stream.SECOND, k)
        chains.x, chains.h = reference.combine_row(chains.x, f, chains.h, coefficients, z)
        self._impose(chains, program, k + 1)

    def _impose(self, chains: Chains, program: Program, k: int) -> None:
        scale, step = program.imposition(k)
        if chains.mask is None or chains.known is None or math.isnan(scale):
            return
        z = self.draw(Stream.REFERENCE, step) if scale else None
        chains.x = reference.impose_known(chains.x, chains.mask, chains.known, scale, z)


class Start(Protocol):
    """Properties of a program or procedure that define where its chains start."""

    @property
    def initial(self) -> str: ...

    @property
    def sigma(self) -> Column: ...

    @property
    def mean(self) -> Column | None: ...


def initial_state(program: Start, seed: int, samples: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draws the chains' initial state (B, *shape), from stream 1 of each sample."""
    if program.initial == "uniform":
        return ops.uniform(seed, samples, Stream.INITIAL, 0, shape)
    x = float(program.sigma[0]) * ops.normal(seed, samples, Stream.INITIAL, 0, shape)
    if program.mean is None:
        return x
    if program.mean.shape != tuple(shape):
        raise ValueError(f"the prior's mean is {program.mean.shape}; expected {tuple(shape)}")
    return x + torch.from_numpy(program.mean).to(x)


def run(
    program: Program,
    network: Callable[[Tensor, int], Tensor],
    chains: Chains,
    *,
    update: Update | None = None,
    start: int = 0,
    stop: int | None = None,
    on_level: Callable[[int], None] | None = None,
) -> Tensor:
    """Runs rows start .. stop-1 (None: all remaining) on the chains and returns their state.

    A run interrupted before row k continues exactly: pass the saved x and h, and start=k.

    Args:
        network: (u, k) -> raw output f of row k, shape of u = scale x + shift.
        on_level: called after each level with the number of rows done.
    """
    update = update or FusedUpdate()
    stop = program.nfe if stop is None else stop
    if program.has_history and chains.h is None:
        chains.h = torch.zeros_like(chains.x)
    if start == 0:
        update.begin(chains, program)
    for rows in program.level_rows():
        for k in rows:
            if start <= k < stop:
                update.row(chains, network(program.input(chains.x, k), k), program, k)
        if start < rows.stop <= stop and on_level is not None:
            on_level(rows.stop)
    return chains.x
