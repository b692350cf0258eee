"""What engines accept as chains and as rows of a program: everything else is refused, untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import CPU, chains_of, model, program_of
from torch import Tensor

from ncsn_fast.engines import ENGINES
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.procedure import Guide
from ncsn_fast.samplers.program import Chains, Program
from ncsn_fast.samplers.program_transforms import inpainting

N, SHAPE = 8, (8, 3, 16, 16)


@pytest.fixture(scope="module", params=[EagerEngine, CpuEngine], ids=lambda kind: kind.name)
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param(model(), device=CPU, dtype="fp32", batch_size=N)


@pytest.fixture(scope="module")
def program(engine: Engine) -> Program:
    """Rows with history, and known pixels."""
    return inpainting(program_of(engine.model, "dpmpp"))


def whole(engine: Engine) -> Chains:
    """Chains with all that they may have."""
    chains = chains_of(engine.model, N)
    chains.h = torch.rand(SHAPE)
    chains.noise_weights = torch.rand(N, 2)
    chains.mask, chains.known = torch.rand(SHAPE) > 0.5, torch.rand(SHAPE)
    chains.nonfinite, chains.count = torch.zeros(N, dtype=torch.int32), N - 1
    return chains


def lost(x: Tensor) -> Tensor:
    """A tensor whose storage somebody has freed."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


FEWER = "must have shape"
# Field -> its wrong values, and what is said of them.
WRONG: dict[str, list[tuple[str, Callable[[Any], Any], type[Exception], str]]] = {
    "samples": [
        ("slice", lambda z: torch.arange(2 * N)[::2], ValueError, "samples must be contiguous"),
        ("first two", lambda z: z[:2], ValueError, r"must have shape \(8,\); got \(2,\)"),
        ("int32", lambda z: z.int(), TypeError, "samples must be torch.int64; got torch.int32"),
        ("float", lambda z: z.float(), TypeError, "samples must be torch.int64"),
        ("empty", lambda z: z[:0], ValueError, r"samples must have shape \(8,\); got \(0,\)"),
        ("scalar", lambda z: z[0], ValueError, FEWER),
        ("column", lambda z: z[:, None], ValueError, FEWER),
        ("expanded", lambda z: z[:1].expand(N), ValueError, "samples must be contiguous"),
        ("meta", lambda z: z.to("meta"), ValueError, "samples must be on cpu; it is on meta"),
        ("list", lambda z: z.tolist(), TypeError, "samples must be a tensor; got list"),
        ("none", lambda z: None, TypeError, "samples must be a tensor; got NoneType"),
    ],
    "h": [
        ("short", lambda h: h[:, :, :8], ValueError, r"h must have shape \(8, 3, 16, 16\)"),
        ("flat", lambda h: h.flatten(), ValueError, FEWER),
        ("one image", lambda h: h[:1].clone(), ValueError, FEWER),
        ("expanded", lambda h: h[:1].expand(SHAPE), ValueError, "h must be contiguous"),
        ("bf16", lambda h: h.bfloat16(), TypeError, "h must be torch.float32; got torch.bfloat16"),
        ("float64", lambda h: h.double(), TypeError, "h must be torch.float32; got torch.float64"),
        ("nhwc", lambda h: h.to(memory_format=torch.channels_last), ValueError, "contiguous"),
        ("meta", lambda h: h.to("meta"), ValueError, "h must be on cpu"),
    ],
    "x": [
        ("float64", lambda x: x.double(), TypeError, "x must be torch.float32; got torch.float64"),
        ("bf16", lambda x: x.bfloat16(), TypeError, "x must be torch.float32"),
        ("nhwc", lambda x: x.to(memory_format=torch.channels_last), ValueError, "contiguous"),
        ("every other", lambda x: torch.rand(2 * N, 3, 16, 16)[::2], ValueError, "contiguous"),
        ("meta", lambda x: x.to("meta"), ValueError, "x must be on cpu; it is on meta"),
        ("no batch", lambda x: x[0], ValueError, r"x must have shape \(B, C, H, W\)"),
        ("array", lambda x: x.numpy(), TypeError, "x must be a tensor; got ndarray"),
    ],
    "noise_weights": [
        ("one of two", lambda w: w[:, 0].clone(), ValueError, r"must have shape \(8, 2\)"),
        ("one row", lambda w: w[:1], ValueError, FEWER),
        ("transposed", lambda w: w.T.contiguous(), ValueError, FEWER),
        ("expanded", lambda w: w[:1].expand(N, 2), ValueError, "contiguous"),
        ("float64", lambda w: w.double(), TypeError, "noise_weights must be torch.float32"),
        ("meta", lambda w: w.to("meta"), ValueError, "noise_weights must be on cpu"),
    ],
    "mask": [
        ("of an image", lambda m: m[:1], ValueError, r"mask must have shape \(8, 3, 16, 16\)"),
        ("(1, 1, H, W)", lambda m: m[:1, :1].clone(), ValueError, FEWER),
        ("expanded", lambda m: m[:1, :1].expand(SHAPE), ValueError, "mask must be contiguous"),
        ("bytes", lambda m: m.to(torch.uint8), TypeError, "mask must be torch.bool"),
        ("meta", lambda m: m.to("meta"), ValueError, "mask must be on cpu"),
        ("without known", lambda m: None, ValueError, "mask and known come together"),
    ],
    "known": [
        ("(1, 1, H, W)", lambda k: k[:1, :1].clone(), ValueError, r"known must have shape \(8, 3,"),
        ("float64", lambda k: k.double(), TypeError, "known must be torch.float32"),
        ("nhwc", lambda k: k.to(memory_format=torch.channels_last), ValueError, "contiguous"),
        ("without mask", lambda k: None, ValueError, "mask and known come together"),
    ],
    "nonfinite": [
        ("int64", lambda n: n.long(), TypeError, "nonfinite must be torch.int32"),
        ("short", lambda n: n[:3], ValueError, r"nonfinite must have shape \(8,\)"),
    ],
    "seed": [
        ("negative", lambda s: -1, ValueError, r"seed must be in \[0, 2\*\*32\)"),
        ("too large", lambda s: 2**32, ValueError, r"seed must be in \[0, 2\*\*32\)"),
    ],
    "count": [("too large", lambda c: N + 1, ValueError, r"count must be in 0 \.\. 8; got 9")],
}  # fmt: skip
CASES = [
    pytest.param(field, *rest, id=f"{field} {name}")
    for field, values in WRONG.items()
    for name, *rest in values
]


def untouched(chains: Chains, before: Tensor) -> bool:
    return not isinstance(chains.x, Tensor) or chains.x.is_meta or torch.equal(chains.x, before)


@pytest.mark.parametrize(("field", "change", "error", "text"), CASES)
def test_chains_that_do_not_fit_are_refused(engine, program, field, change, error, text):
    calls: list[Callable[[Chains], object]] = [
        lambda chains: engine.run(program, chains),
        lambda chains: engine.run(program, chains, guide=Unused()),
        lambda chains: engine.stepper(program, chains, None, None),
        lambda chains: engine.solve(methods.build("ode", engine.model, None, {}), chains),
    ]
    for call in calls:
        chains = whole(engine)
        setattr(chains, field, change(getattr(chains, field)))
        before = chains.x.clone() if isinstance(chains.x, Tensor) else None
        with pytest.raises(error, match=text):
            call(chains)
        assert untouched(chains, before)


class Unused(Guide):
    """A guide that must not be asked."""

    def __len__(self) -> int:
        return N

    def rows(self, rows: Tensor, device: torch.device) -> Guide:
        raise AssertionError

    def score(self, score: Any, x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError


def test_whole_chains_run(engine, program):
    chains = whole(engine)
    mask, known = chains.mask.clone(), chains.known.clone()
    x = engine.run(program, chains)
    assert torch.isfinite(x).all()
    assert torch.equal(x[mask], known[mask])


@pytest.mark.parametrize("field", ["samples", "h", "known"])
def test_memory_that_was_freed_is_not_read(field):
    built = CpuEngine(model(), device=CPU, dtype="fp32", batch_size=N)
    chains = whole(built)
    setattr(chains, field, lost(getattr(chains, field)))
    with pytest.raises(ValueError, match=f"{field} must have memory; its storage has been freed"):
        built.run(inpainting(program_of(built.model, "dpmpp")), chains)


def test_a_micro_batch_of_another_size_is_refused(engine, program):
    for n in (1, N - 1, N + 1):
        with pytest.raises(ValueError, match=f"runs batches of 8; got {n} images"):
            engine.run(program_of(engine.model), chains_of(engine.model, n))
    chains = chains_of(engine.model, N)
    chains.x = torch.rand(N, 1, 16, 16)
    with pytest.raises(ValueError, match=r"expected images \(N, 3, H, W\)"):
        engine.run(program_of(engine.model), chains)


def test_known_pixels_are_imposed_by_a_program_that_has_some_and_no_other(engine, program):
    without = whole(engine)
    without.mask = without.known = None
    with pytest.raises(ValueError, match=r"'.*' imposes known pixels: give chains mask and known"):
        engine.run(program, without)
    plain = program_of(engine.model, "dpmpp")
    with pytest.raises(ValueError, match=r"imposes no known pixels: make it with .*inpainting"):
        engine.run(plain, whole(engine))


@pytest.mark.parametrize(("first", "stop"), [(-1, 1), (0, 8), (7, 8), (3, 2), (-3, -1), (8, 8)])
def test_rows_outside_of_the_program_are_refused(engine, program, first, stop):
    seven = program.head(7)
    chains = whole(engine)
    run_rows = engine.stepper(seven, chains, None, None)
    before = chains.x.clone()
    with pytest.raises(ValueError, match=rf"rows must lie in 0 \.\. 7.*; got {first} \.\. {stop}"):
        run_rows(first, stop)
    assert torch.equal(chains.x, before)


def test_a_start_outside_of_the_program_is_refused(engine, program):
    for start in (-1, program.nfe + 1):
        with pytest.raises(ValueError, match=f"rows must lie in 0 .. {program.nfe}"):
            engine.run(program, whole(engine), start=start)
    chains = whole(engine)
    before = chains.x.clone()
    assert torch.equal(engine.run(program, chains, start=program.nfe), before)


@pytest.mark.parametrize("kind", [EagerEngine, CpuEngine])
def test_levels_are_those_of_the_rows_and_of_the_images(kind):
    built = kind(model("ncsn"), device=CPU, dtype="fp32", batch_size=2)
    program, chains = program_of(built.model), chains_of(built.model)
    for levels in (None, torch.zeros(program.nfe - 1, dtype=torch.int64), torch.zeros(1, 1).long()):
        with pytest.raises(ValueError, match=rf"levels must have shape \({program.nfe},\)"):
            built.stepper(program, chains, levels, None)
    with pytest.raises(ValueError, match=r"level must have shape \(2,\); got \(1,\)"):
        built.check_call(chains.x, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("kind", ENGINES.values(), ids=lambda kind: kind.name)
def test_every_engine_checks_in_the_same_place(kind):
    """Engines have a `_stepper` of their own; what checks for it is the base's."""
    for name in ("run", "stepper", "solve", "check_run", "check_chains"):
        assert getattr(kind, name) is getattr(Engine, name)


def test_a_plan_made_while_torch_makes_float64_is_the_same():
    of = model("ncsn")
    built, program = CpuEngine(of, device=CPU, dtype="fp32", batch_size=2), program_of(of)
    expected, again = built.run(program, chains_of(of)), chains_of(of)
    built.release()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(built.run(program, again), expected)
    finally:
        torch.set_default_dtype(torch.float32)
