"""Memory-bound kernels of both families against PyTorch, in bytes per second.

Each byte counts once read and once written, in the layout that the network uses.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import published
import torch
import torch.nn.functional as F
from ncsn_fast.kernels.rows import new_rows
from race import Absent, Entrant, relative_error
from torch import Tensor

from gpu import timing
from gpu.section import Section
from ncsn_fast import ops
from ncsn_fast.ops import reference
from ncsn_fast.ops.noise import Stream

# C, H, W and the batch sizes; torch.compile runs the last one of each (others use the same kernel).
NORMS = {(128, 32, 32): (1, 16, 256), (256, 16, 16): (1, 16, 256), (128, 256, 256): (1, 8)}
GROUP_NORMS = {(128, 32, 32): (16, 256), (256, 16, 16): (16, 256)}
SMALL_NORMS = {(8, 2, 2): (1,)}
UPDATES = {(3, 32, 32): 256, (3, 256, 256): 16}
SMALL_UPDATES = {(3, 2, 2): 1}
SINGLE_BYTES = 1 << 20  # "single" has one program per sample: larger samples leave the device idle
PADDED = 8  # channels per pixel of the network's input and output, padding included
SECONDS = 1.0
ROW = (1.0, 0.01, 0.0, 0.1, 0.0, 0.0)


def library(name: str) -> Any:
    """Imports a module of this package.

    Raises Absent, with the reason, if it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} cannot be imported: {error}") from error


# Instance normalisation++ ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Norm:
    """Input and output buffer of IN++."""

    x: Tensor
    parameters: list[Tensor]
    out: Tensor


def norms(section: Section) -> None:
    """Times IN++ with ELU, bfloat16, channels-last, on rotating inputs and on a fixed one."""
    sizes = SMALL_NORMS if section.small else NORMS
    cases = []
    for shape, batches in sizes.items():
        for batch in batches:
            set_bytes = 4 * batch * shape[0] * shape[1] * shape[2]
            cases.append((shape, batch, "cold", batch == batches[-1]))
            if timing.fits_cache(set_bytes, section.device):
                cases.append((shape, batch, "warm", False))
    cases.sort(key=lambda case: (case[2], -case[1]))  # large batches first, cold ones first
    section.plan((_title(*case[:3]), _norm_providers(*case)) for case in cases)
    for case in cases:
        shape, batch, cache, _ = case
        count = 2 * batch * shape[0] * shape[1] * shape[2]
        sets = timing.sets_beyond_cache(2 * count, section.device) if cache == "cold" else 1
        inputs = [_norm_input((batch, *shape), section.device) for _ in range(sets)]
        builders = {
            name: functools.partial(_enter_norm, section, name, inputs)
            for name in _norm_providers(*case)
        }
        section.race(
            _title(shape, batch, cache), builders, seconds=SECONDS, bytes=2 * count, batch=batch,
            cache=cache, sets=sets, kernel="IN++ with ELU",
        )  # fmt: skip


def _title(shape: tuple[int, ...], batch: int, cache: str) -> str:
    return f"IN++ with ELU, {'x'.join(map(str, shape))}, B = {batch}, {cache}"


def _norm_providers(shape: tuple[int, ...], batch: int, cache: str, compiled: bool) -> list[str]:
    names = ["torch", *(["compiled"] if compiled else []), "triton-auto", "triton-split"]
    single = 2 * shape[0] * shape[1] * shape[2] <= SINGLE_BYTES
    return [*names, *(["triton-single"] if single else []), "cuda-split",
            *(["cuda-single"] if single else [])]  # fmt: skip


def _norm_input(shape: tuple[int, ...], device: torch.device) -> Norm:
    x = torch.randn(shape, device=device).mul(1.7).sub(0.3).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    alpha, gamma, beta = torch.randn(3, shape[1], device=device).mul(0.3)
    return Norm(x, [1 + alpha, 1 + gamma, beta], torch.full_like(x, torch.nan))


def _enter_norm(section: Section, name: str, inputs: list[Norm]) -> Entrant:
    if section.small and name == "compiled":
        raise Absent("a rehearsal compiles nothing")
    make = _norm_call(name)
    with torch.no_grad():  # graphs captured under inference mode harm the others before torch 2.11
        calls = [make(norm) for norm in inputs]
        first = inputs[0]
        y = calls[0]()
        exact = reference.instance_norm_plus(first.x.double(), *first.parameters, elu=True)
        error = relative_error(y, exact)
        run, count = section.lap_of(calls)
    return Entrant(run, lambda: error, 2e-2, {"calls": count})


def _norm_call(name: str) -> Callable[[Norm], timing.Call]:
    """Returns the function that makes a provider's call for an input."""
    if name in ("torch", "compiled"):
        statement: Callable[..., Tensor] = _published_norm
        if name == "compiled":
            torch._dynamo.reset()
            statement = torch.compile(_published_norm, dynamic=False)
        return lambda norm: functools.partial(
            statement, norm.x, *(p.to(norm.x.dtype) for p in norm.parameters)
        )
    family, form = name.split("-")
    native = family == "cuda"
    module = library("ncsn_fast.ops.native" if native else "ncsn_fast.kernels.instance_norm_plus")
    # The two families split a map differently, so each has its own workspace.
    workspace = module if native else library("ncsn_fast.kernels.norm_statistics")
    return lambda norm: functools.partial(
        module.instance_norm_plus, norm.x, *norm.parameters, elu=True, eps=1e-5, out=norm.out,
        partials=workspace.new_partials(norm.x), form=form,
    )  # fmt: skip


def _published_norm(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.elu(published.instance_norm_plus(x, alpha, gamma, beta))


# Group norm --------------------------------------------------------------------------------------


def group_norms(section: Section) -> None:
    """Times group norm of x + add with SiLU, bfloat16, channels-last, on rotating inputs."""
    sizes = SMALL_NORMS if section.small else GROUP_NORMS
    cases = [(shape, batch) for shape, batches in sizes.items() for batch in batches]
    names = ["torch", "triton-auto", "triton-split", "cuda-split"]
    section.plan((_group_title(*case), names) for case in cases)
    for shape, batch in cases:
        count = 2 * batch * shape[0] * shape[1] * shape[2]
        sets = timing.sets_beyond_cache(2 * count, section.device)
        inputs = [_group_input((batch, *shape), section.device) for _ in range(sets)]
        builders = {n: functools.partial(_enter_group_norm, section, n, inputs) for n in names}
        section.race(
            _group_title(shape, batch), builders, seconds=SECONDS, bytes=2 * count, batch=batch,
            cache="cold", sets=sets, kernel="group norm with SiLU",
        )  # fmt: skip


def _group_title(shape: tuple[int, ...], batch: int) -> str:
    return f"group norm with SiLU, {'x'.join(map(str, shape))}, B = {batch}, cold"


def _group_input(shape: tuple[int, ...], device: torch.device) -> Norm:
    norm = _norm_input(shape, device)
    return Norm(norm.x, [*norm.parameters[1:], torch.randn(shape[:2], device=device)], norm.out)


def _enter_group_norm(section: Section, name: str, inputs: list[Norm]) -> Entrant:
    make = _group_norm_call(name)
    with torch.no_grad():  # graphs captured under inference mode harm the others before torch 2.11
        calls = [make(norm) for norm in inputs]
        x, (gamma, beta, add) = inputs[0].x.double(), inputs[0].parameters
        y, groups = calls[0](), _groups(x)
        exact = reference.group_norm(x, groups, gamma, beta, add=add, activation="silu")
        error = relative_error(y, exact)
        run, count = section.lap_of(calls)
    return Entrant(run, lambda: error, 2e-2, {"calls": count})


def _groups(x: Tensor) -> int:
    return min(32, x.shape[1] // 4)


def _group_norm_call(name: str) -> Callable[[Norm], timing.Call]:
    """Returns the function that makes a provider's call for an input."""
    if name == "torch":
        return lambda norm: functools.partial(
            _plain_group_norm, norm.x, *(p.to(norm.x.dtype) for p in norm.parameters)
        )
    family, form = name.split("-")
    native = family == "cuda"
    module = library("ncsn_fast.ops.native" if native else "ncsn_fast.kernels.group_norm")
    options = {} if native else {"form": form}
    return lambda norm: functools.partial(
        module.group_norm, norm.x, _groups(norm.x), *norm.parameters[:2], add=norm.parameters[2],
        activation="silu", out=norm.out, workspace=module.new_workspace(norm.x), **options,
    )  # fmt: skip


def _plain_group_norm(x: Tensor, gamma: Tensor, beta: Tensor, add: Tensor) -> Tensor:
    return F.silu(F.group_norm(x + add[:, :, None, None], _groups(x), gamma, beta))


# Sampler update ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class State:
    """State, network output and next input, the latter two padded and channels-last."""

    x: Tensor
    f: Tensor
    net_input: Tensor

    def clone(self) -> State:
        copy = _new_state(tuple(self.x.shape), self.x.device)
        copy.x.copy_(self.x)
        copy.f.copy_(self.f)
        return copy


def updates(section: Section) -> None:
    """Times a row of Langevin dynamics: state in float32, the network's tensors in bfloat16."""
    sizes = SMALL_UPDATES if section.small else UPDATES
    names = ["torch", "triton", "cuda"]
    section.plan((_update_title(shape, batch), names) for shape, batch in sizes.items())
    for shape, batch in sizes.items():
        pixels = batch * shape[1] * shape[2]
        # Bytes: state read and written in float32, f read and the input written as whole pixels.
        count = pixels * (2 * 4 * shape[0] + 2 * 2 * PADDED)
        sets = timing.sets_beyond_cache(count, section.device)
        states = [_new_state((batch, *shape), section.device) for _ in range(sets)]
        builders = {name: functools.partial(_enter_update, section, name, states) for name in names}
        section.race(
            _update_title(shape, batch), builders, seconds=SECONDS, bytes=count, batch=batch,
            cache="cold", sets=sets, kernel="sampler update",
        )  # fmt: skip


def _update_title(shape: tuple[int, ...], batch: int) -> str:
    return f"sampler update, {'x'.join(map(str, shape))}, B = {batch}, cold"


def _new_state(shape: tuple[int, ...], device: torch.device) -> State:
    n, c, height, width = shape
    padded = torch.zeros(n, PADDED, height, width, dtype=torch.bfloat16, device=device)
    padded = padded.contiguous(memory_format=torch.channels_last)
    f, net_input = padded.clone(), torch.full_like(padded, torch.nan)
    f[:, :c] = torch.randn(shape, device=device)
    return State(torch.randn(shape, device=device), f[:, :c], net_input)


def _enter_update(section: Section, name: str, states: list[State]) -> Entrant:
    make = _eager_update if name == "torch" else _kernel_update(name, len(states[0].x))
    with torch.no_grad():  # graphs captured under inference mode harm the others before torch 2.11
        probe, before = states[0].clone(), states[0]
        if name == "torch":  # its noise is different, so it is checked without noise
            make(probe, noise=0.0)()
        else:
            make(probe)()
        noise = 0.0 if name == "torch" else ROW[3]
        error = _update_error(probe, before, noise)
        run, count = section.lap_of([make(state) for state in states])
    return Entrant(run, lambda: error, 1.0, {"calls": count})


def _update_error(after: State, before: State, noise: float) -> float:
    """Returns the error of state and next input, relative to their tolerances (1e-5 and 1e-2)."""
    shape, samples = tuple(before.x.shape), torch.arange(len(before.x))
    z = ops.normal(1, samples, Stream.SAMPLER, 7, shape[1:])
    exact = before.x.cpu().double() + ROW[1] * before.f.cpu().double() + noise * z.double()
    errors = (
        relative_error(after.x.cpu(), exact) / 1e-5,
        relative_error(after.net_input[:, : shape[1]].cpu(), 2 * exact - 1) / 1e-2,
    )
    return max(errors) if errors[0] == errors[0] and errors[1] == errors[1] else torch.nan


def _eager_update(state: State, noise: float = ROW[3]) -> timing.Call:
    """Returns the in-place update in plain PyTorch."""

    def call() -> None:
        state.x.add_(state.f, alpha=ROW[1]).add_(torch.randn_like(state.x), alpha=noise)
        state.net_input[:, : state.x.shape[1]] = 2 * state.x - 1

    return call


def _kernel_update(family: str, batch: int) -> Callable[[State], timing.Call]:
    module = library(
        "ncsn_fast.ops.native" if family == "cuda" else "ncsn_fast.kernels.sampler_update"
    )

    def make(state: State) -> timing.Call:
        device = state.x.device
        numbers = torch.tensor([[*ROW, 0, 0, torch.nan, 2, -1]], dtype=torch.float64)
        rows = new_rows(numbers, torch.tensor([[7, 0]]), device)
        seeds = torch.full((batch,), 1, dtype=torch.int64, device=device)
        samples = torch.arange(batch, device=device)
        return lambda: module.sampler_update_(
            state.x, state.f, None, rows, seeds=seeds, samples=samples, net_input=state.net_input
        )

    return make
