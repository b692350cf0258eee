"""Fuzzer of every GPU launcher: random shapes, dtypes, layouts and options, against float64.

A script, not a test: `python tests/support/gpu_fuzz.py --cases 200`. Each case has its own seed,
which a failure prints. Results are allocated between guards that must stay untouched, in memory
initialised to NaN. Under compute-sanitizer, with PyTorch's caching allocator off, every access out
of bounds is an error; without a GPU, TRITON_INTERPRET=1 and `--device cpu --tiny` run a rehearsal.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from fuzz_draw import Draw, close, exact
from group_norm_cases import slack
from program_rows import rows_of
from torch import Tensor

from ncsn_fast.ops import reference
from ncsn_fast.ops.activations import ACTIVATIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def norm_floor(x: Tensor, alpha: Tensor, gamma: Tensor, eps: float) -> float:
    """Returns the change of y if float32 sums shift every mean by 2^-22 of the largest |x|."""
    if x.numel() == 0:
        return 0.0
    means = x.mean(dim=(2, 3))
    across = means.var(dim=1) if x.shape[1] > 1 else torch.zeros(len(x), dtype=x.dtype)
    within = x.var(dim=(2, 3), correction=0)
    slopes = (within + eps).rsqrt() + alpha.abs() * (across + eps).rsqrt()[:, None]
    return float(2.0**-22 * x.abs().max() * (gamma.abs() * slopes).max())


def bias_for(draw: Draw, launcher: Any, channels: int) -> dict[str, Tensor]:
    """Draws a bias (C,), in some cases, for a launcher that takes one."""
    if "bias" not in inspect.signature(launcher).parameters or draw.choose("bias", (True, False)):
        return {}
    return {"bias": draw.numbers(channels).to(draw.device)}


# Launchers ---------------------------------------------------------------------------------------


def instance_norm_plus(draw: Draw, module: Any, partials: Callable[[Tensor], Tensor]) -> None:
    n, c, *_ = shape = draw.shape()
    native = module.__name__.endswith("native")
    dtypes = FLOATS[:2] if native and draw.device == "cpu" else FLOATS
    x, rows = draw.map(shape, draw.choose("dtype", dtypes)), draw.affine(n, c)
    options = {
        "elu": draw.choose("elu", (True, False)),
        "eps": draw.choose("eps", (1e-5, 1e-3)),
    }
    form = draw.choose("form", ("auto", "split", "single"))
    out = draw.out(shape, x.dtype)
    workspace = partials(x) if draw.choose("workspace", (True, False)) else None
    shifted = x
    extra: dict[str, Any] = {"out": out, "partials": workspace, "form": form}
    extra |= bias_for(draw, module.instance_norm_plus, c)
    if "bias" in extra:
        shifted = x.float() + extra["bias"][:, None, None]
    try:
        y = module.instance_norm_plus(x, *rows, **options, **extra)
    except ValueError as error:
        if "multiple of 16 bytes" in str(error) and x.data_ptr() % 16:
            draw.guards.clear()  # rejected with an error, as documented
            return
        raise
    assert y is out, "out is not what is returned"
    exact_x = exact(x) + (exact(extra["bias"])[:, None, None] if "bias" in extra else 0.0)
    truth = reference.instance_norm_plus(exact_x, *map(exact, rows), **options)
    eager = reference.instance_norm_plus(shifted.cpu(), *(p.cpu() for p in rows), **options)
    floor = norm_floor(exact_x, exact(rows[0]), exact(rows[1]), options["eps"])
    close("y", y, truth, eager, floor)


def group_norm(draw: Draw, module: Any) -> None:
    n, c, *_ = shape = draw.shape()
    native = module.__name__.endswith("native")
    dtypes = FLOATS[:2] if native and draw.device == "cpu" else FLOATS
    x = draw.map(shape, draw.choose("dtype", dtypes))
    groups = draw.choose("groups", [g for g in (1, 2, 3, 4, 8, 16, c) if c % g == 0])
    rows = {"gamma": (c,), "beta": (c,), "add": (n, c), "scale": (n, c), "shift": (n, c)}
    given = {k: draw.numbers(*size).to(draw.device) for k, size in rows.items()}
    given = {k: t for k, t in given.items() if draw.choose(k, (True, False))}
    options = {
        "activation": draw.choose("activation", ACTIVATIONS),
        "eps": draw.choose("eps", (1e-5, 1e-3)),
    }
    extra: dict[str, Any] = {"out": draw.out(shape, x.dtype)}
    if draw.choose("workspace", (True, False)):
        extra["workspace"] = module.new_workspace(x)
    if not native:
        forms = ("auto", "split", "single") if module.fits_single(c, groups) else ("auto", "split")
        extra["form"] = draw.choose("form", forms)
    try:
        y = module.group_norm(x, groups, **given, **options, **extra)
    except ValueError as error:
        if "multiple of 16 bytes" in str(error) and x.data_ptr() % 16:
            draw.guards.clear()  # rejected with an error, as documented
            return
        raise
    assert y is extra["out"], "out is not what is returned"
    exactly = {k: exact(t) for k, t in given.items()}
    truth = reference.group_norm(exact(x), groups, **exactly, **options)
    on_cpu = {k: t.cpu() for k, t in given.items()}
    eager = reference.group_norm(x.cpu(), groups, **on_cpu, **options)
    close("y", y, truth, eager, 16 * slack(exact(x), groups, on_cpu))


def instance_norm_plus_backward(draw: Draw, module: Any) -> None:
    n, c, *_ = shape = draw.shape()
    dtype = draw.choose("dtype", FLOATS)
    x, grad, rows = draw.map(shape, dtype), draw.map(shape, dtype), draw.affine(n, c)
    elu = draw.choose("elu", (True, False))
    ours = module.instance_norm_plus_backward(grad, x, *rows, elu=elu)
    names = ("dx", "dalpha", "dgamma", "dbeta")
    truths = reference.instance_norm_plus_backward(
        exact(grad), exact(x), *map(exact, rows), elu=elu
    )
    eagers = reference.instance_norm_plus_backward(
        grad.cpu(), x.cpu(), *(p.cpu() for p in rows), elu=elu
    )
    moved = norm_floor(exact(x), exact(rows[0]), exact(rows[1]), 1e-5)
    for name, mine, truth, eager in zip(names, ours, truths, eagers, strict=True):
        largest = float(truth.abs().max()) if truth.numel() else 0.0
        close(name, mine, truth, eager, (16 * torch.finfo(mine.dtype).eps + 64 * moved) * largest)


def add_elu(draw: Draw, module: Any) -> None:
    shape, dtype = draw.shape(), draw.choose("dtype", FLOATS)
    a, b, out = draw.map(shape, dtype), draw.map(shape, dtype), draw.out(shape, dtype)
    which = draw.choose("op", ("elu", "add", "add_elu", "pointwise"))
    bias = bias_for(draw, getattr(module, which), shape[1])
    if which == "pointwise":
        pointwise(draw, module, [a, b, draw.map(shape, dtype)], bias.get("bias"), out)
        return
    added = exact(bias["bias"])[:, None, None] if bias else 0.0
    if which == "elu":
        y = module.elu(a, out=out, **bias)
        close("elu", y, reference.elu(exact(a) + added), None, 1e-6)
        return
    truths = reference.add_elu(exact(a), exact(b) + added)
    floor = 1e-6 * float(a.abs().max() + b.abs().max() + 4) if a.numel() else 0.0
    if which == "add":
        close("sum", module.add(a, b, out=out, **bias), truths[0], None, floor)
        return
    total = draw.out(shape, dtype, "total")
    module.add_elu(a, b, total=total, out=out, **bias)
    close("sum", total, truths[0], None, floor)
    close("elu", out, truths[1], reference.add_elu(a.cpu(), b.cpu())[1], floor)


def pointwise(
    draw: Draw, module: Any, maps: list[Tensor], bias: Tensor | None, out: Tensor
) -> None:
    """Checks one to three maps, with the sum written over the first of them or elsewhere."""
    terms = maps[: draw.choose("terms", (1, 2, 3))]
    activation = draw.choose("activation", ACTIVATIONS)
    weights = [0.7, -1.25, 0.5][: len(terms)] if draw.choose("weights", (True, False)) else []
    factors = weights or [1.0] * len(terms)
    truth = sum(w * exact(x) for w, x in zip(factors, terms, strict=True))
    truth = truth + (0.0 if bias is None else exact(bias)[:, None, None])
    floor = 1e-6 * float(sum(t.abs().max() for t in terms) + 4) if out.numel() else 0.0
    expected = reference.activation(truth.to(out.dtype), activation)
    total = terms[0] if draw.choose("in place", (True, False)) else draw.out(out.shape, out.dtype)
    module.pointwise(terms, bias, total, out, activation, weights)
    close("sum", total, truth, None, floor)
    close(activation, out, reference.activation(truth, activation), expected, floor)


def scale_shift(draw: Draw, module: Any) -> None:
    n, c, *_ = shape = draw.shape()
    x, rows = draw.map(shape, draw.choose("dtype", FLOATS)), draw.numbers(n, 3, c).to(draw.device)
    activation = draw.choose("activation", ACTIVATIONS)

    def specified(x: Tensor, rows: Tensor) -> Tensor:
        mean, scale, shift = rows.unbind(1)
        moved = reference.scale_shift(x, None, -mean)
        return reference.scale_shift(moved, scale, shift, activation)

    y = module.scale_shift(x, rows, activation, out=draw.out(shape, x.dtype))
    truth, eager = specified(exact(x), exact(rows)), specified(x.cpu().float(), rows.cpu())
    floor = (
        4e-6 * float(rows.abs().max() * (x.float().abs().max() + rows.abs().max())) if n else 0.0
    )
    close("y", y, truth, eager.to(x.dtype), floor)


def pool5(draw: Draw, module: Any) -> None:
    shape = draw.shape()
    x, name = draw.map(shape, draw.choose("dtype", FLOATS)), draw.choose("op", ("max", "avg"))
    y = getattr(module, f"{name}_pool5")(x, out=draw.out(shape, x.dtype))
    floor = 1e-6 * float(x.abs().max()) if x.numel() else 0.0
    truth = getattr(reference, f"{name}_pool5")(exact(x)) if x.numel() else exact(x)
    close("y", y, truth, None, floor)


def mean_pool2(draw: Draw, module: Any) -> None:
    n, c, height, width = shape = draw.shape(even=True)
    dtype = draw.choose("dtype", FLOATS)
    a = draw.map(shape, dtype)
    b = draw.map(shape, dtype) if draw.choose("two", (True, False)) else None
    small = (n, c, height // 2, width // 2)
    truth = reference.mean_pool2(exact(a), exact(b)) if n else torch.empty(small)
    floor = 1e-6 * float(a.abs().max()) if n else 0.0
    close("y", module.mean_pool2(a, b, out=draw.out(small, dtype)), truth, None, floor)


def resize_add(draw: Draw, module: Any) -> None:
    n, c, height, width = shape = draw.shape()
    dtype = draw.choose("dtype", FLOATS)
    size = (draw.random.randint(1, 2 * height + 1), draw.random.randint(1, 2 * width + 1))
    draw.chosen["to"] = size
    x, larger = draw.map(shape, dtype), (n, c, *size)
    a = draw.map(larger, dtype) if draw.choose("sum", (True, False)) else None
    y = module.resize_add(x, size, a, out=draw.out(larger, dtype))
    truth = reference.resize_add(exact(x), size, exact(a)) if n else torch.empty(larger)
    close("y", y, truth, None, 1e-5 * float(x.abs().max()) if n else 0.0)


def sampler_update(draw: Draw, module: Any) -> None:
    """Checks one of three rows, in place, and the counter."""
    n, c, height, width = shape = draw.shape()
    numbers = lambda: draw.numbers(*shape).to(draw.device)  # noqa: E731
    x, h = numbers(), numbers() if draw.choose("history", (True, False)) else None
    known = numbers() if draw.choose("mask", (True, False)) else None
    mask = None if known is None else (draw.numbers(*shape) > 0).to(draw.device)
    weights = draw.numbers(n, 2).to(draw.device) if draw.choose("weights", (True, False)) else None
    width_of_f, width_of_input = (draw.random.choice((0, max(8, c))) for _ in range(2))
    f = draw.map((n, width_of_f or c, height, width), draw.choose("dtype", FLOATS))[:, :c]
    net = draw.out((n, width_of_input or c, height, width), draw.choose("input", FLOATS), "input")
    flags = torch.zeros(n, dtype=torch.int32, device=draw.device)
    table, steps = draw.numbers(3, 8), torch.tensor([[0, 9], [2**32 - 1, 0], [7, 2**31]])
    table[:, 3] = table[:, 3] if draw.choose("noise", (True, True, False)) else 0.0
    c_refs = torch.tensor([math.nan, 0.5, 0.0])
    inputs = draw.numbers(3, 2)
    rows = rows_of(table, c_refs, steps, draw.device, inputs)
    k = draw.choose("row", (0, 1, 2))
    rows.counter.fill_(k)
    seed, samples = 2**32 - 3, torch.arange(n) + 2**32 - 5
    state = exact(x), exact(f), exact(h)
    module.sampler_update_(
        x, f, h, rows, seeds=torch.full((n,), seed).to(draw.device), mask=mask, known=known,
        samples=samples.to(draw.device), noise_weights=weights, net_input=net, nonfinite=flags,
    )  # fmt: skip
    module.advance(rows)
    assert rows.counter.item() == k + 1, "the counter was not advanced"
    assert not flags.any(), "finite samples were flagged"
    if n == 0:
        return
    cpu = [None if t is None else t.cpu() for t in (weights, mask, known)]
    truth, history = reference.sampler_update(
        *state, tuple(table[k].double().tolist()), seed=seed, samples=samples,
        step=int(steps[k, 0]), noise_weights=cpu[0], mask=cpu[1], known=exact(cpu[2]),
        c_ref=float(c_refs[k]), ref_step=int(steps[k, 1]),
    )  # fmt: skip
    floor = 2.0**-18 * (1 + float(truth.abs().max()) + float(state[1].abs().max()))
    close("x", x, truth, None, floor)
    if h is not None:
        close("h", h, history, None, floor)
    scale, shift = inputs[k].double().tolist()
    close("input", net[:, :c], scale * truth + shift, None, (1 + abs(scale)) * floor)
    assert not net[:, c:].any(), "channels that pad the next input are not zero"


def triton_launchers() -> dict[str, Callable[[Draw], None]]:
    load = lambda name: importlib.import_module(f"ncsn_fast.kernels.{name}")  # noqa: E731
    partials, norm = load("norm_statistics").new_partials, load("instance_norm_plus")
    plain = (
        add_elu, pool5, mean_pool2, resize_add, sampler_update, group_norm,
        instance_norm_plus_backward,
    )  # fmt: skip
    group = load("group_norm")
    return {
        "instance_norm_plus": lambda draw: instance_norm_plus(draw, norm, partials),
        "scale_shift": lambda draw: scale_shift(draw, group),
    } | {case.__name__: lambda draw, case=case: case(draw, load(case.__name__)) for case in plain}


def native_launchers() -> dict[str, Callable[[Draw], None]]:
    native = importlib.import_module("ncsn_fast.ops.native")
    return {
        "instance_norm_plus": lambda draw: instance_norm_plus(draw, native, native.new_partials),
        "group_norm": lambda draw: group_norm(draw, native),
        "sampler_update": lambda draw: sampler_update(draw, native),
    }


FAMILIES = {"triton": triton_launchers, "native": native_launchers}


def run_case(seed: int, name: str, launcher: Callable[[Draw], None], options: Any) -> bool:
    """Returns whether the case passed; prints how to repeat a failed one."""
    draw = Draw(seed, options.device, options.tiny)
    try:
        launcher(draw)
        if options.device == "cuda":
            torch.cuda.synchronize()
        draw.check_guards()
    except Exception as error:
        if not isinstance(error, AssertionError):
            traceback.print_exc()
        print(f"FAILED {name}: {error or type(error).__name__}; {draw.chosen}")
        print(f"  again: python tests/support/gpu_fuzz.py --only {name} --seed {seed} --cases 1")
        return False
    return True


def main() -> int:
    """Runs the cases; exit code 1 if one failed, 3 if no launcher could be imported."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after these")
    parser.add_argument("--only", default="", help="launchers whose name holds this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for Triton's interpreter")
    options = parser.parse_args()
    launchers: dict[str, Callable[[Draw], None]] = {}
    for family, load in FAMILIES.items():
        try:
            launchers |= {f"{family}.{name}": case for name, case in load().items()}
        except ImportError as error:
            print(f"absent: {family}: {error}")
    names = [name for name in launchers if options.only in name]
    if not names:
        print("nothing to run")
        return 3
    began, passed, done = time.monotonic(), 0, 0
    for seed in range(options.seed, options.seed + options.cases):
        if time.monotonic() - began > options.seconds:
            break
        name = names[seed % len(names)]
        passed += run_case(seed, name, launchers[name], options)
        done += 1
    print(f"{passed} of {done} cases passed ({options.cases} asked for); {', '.join(names)}")
    return int(passed < done)


if __name__ == "__main__":
    sys.exit(main())
