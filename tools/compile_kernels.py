"""Compiles every Triton kernel that production launches for sm_90, without a GPU.

Launchers run on meta tensors while their launches are recorded; each is then compiled with the
types, divisibilities and constants that the JIT would infer, to PTX by Triton and to a cubin by
ptxas. A JSON report lists registers, spills, shared memory and the widths of global accesses:

    python tools/compile_kernels.py [--out FILE] [--only-main]      (TRITON_INTERPRET unset)
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from ncsn_fast.kernels import add_elu, fill, launch, mean_pool2, pool5, resize_add
from ncsn_fast.kernels import group_norm as group
from ncsn_fast.kernels import instance_norm_plus as norm
from ncsn_fast.kernels import instance_norm_plus_backward as backward
from ncsn_fast.kernels.rows import Rows
from ncsn_fast.kernels.sampler_update import advance, sampler_update_
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

REPORT = Path(__file__).parent.parent / "benchmarks" / "results" / "aot-sm90.json"
TARGET = GPUTarget("cuda", 90, 32)
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
    torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Feature maps of NCSNv2 on CIFAR-10 and FFHQ at 256: channels, height and width.
MAPS = ((128, 32), (256, 16), (128, 256))

Case = tuple[str, Callable[[], object]]
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, constants and options


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def maps(channels: int, size: int, dtype: torch.dtype, n: int = 256) -> Tensor:
    return meta(n, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)


def label(x: Tensor) -> str:
    return f"{TYPES[x.dtype]} {x.shape[1]}x{x.shape[2]}x{x.shape[3]}"


def norms() -> Iterator[Case]:
    for dtype in FLOATS:
        for channels, size in MAPS:
            x, rows = maps(channels, size, dtype), [meta(256, channels)] * 3
            forms = ["split", *["single"] * (size < 256)]
            for elu, form in itertools.product((True, False), forms):
                options: Any = {"elu": elu, "form": form}
                yield (
                    f"instance_norm_plus {form}{' elu' * elu} {label(x)}",
                    functools.partial(norm.instance_norm_plus, x, *rows, **options),
                )
            for form in forms:
                options = {"elu": True, "form": form, "bias": meta(channels)}
                yield (
                    f"instance_norm_plus {form} elu with bias {label(x)}",
                    functools.partial(norm.instance_norm_plus, x, *rows, **options),
                )
    for dtype in FLOATS[::2]:  # training
        for channels, size in MAPS[:2]:
            x, rows = maps(channels, size, dtype), [meta(channels)] * 3
            yield (
                f"instance_norm_plus_backward elu {label(x)}",
                functools.partial(backward.instance_norm_plus_backward, x, x, *rows, elu=True),
            )


def group_norms() -> Iterator[Case]:
    for dtype in FLOATS:
        for channels, size in (*MAPS, (320, 16)):  # the last has groups of ten channels
            x, row, rows = maps(channels, size, dtype), meta(channels), meta(256, channels)
            affine = {"gamma": row, "beta": row}
            variants: dict[str, dict[str, Any]] = {
                " silu": {**affine, "activation": "silu"},
                " modulated silu": {
                    **affine, "add": rows, "scale": rows, "shift": rows, "activation": "silu",
                },
            }  # fmt: skip
            if size == 16:
                others = set(launch.ACTIVATIONS) - {"silu"}
                variants |= {f" {name}": {"activation": name} for name in sorted(others)}
            forms = ["split", *["single"] * (size < 256 and channels != 320)]
            for form, (name, options) in itertools.product(forms, variants.items()):
                yield (
                    f"group_norm {form}{name} {label(x)}",
                    functools.partial(group.group_norm, x, 32, form=form, **options),
                )


def updates() -> Iterator[Case]:
    for dtype, (channels, size) in itertools.product(FLOATS, ((3, 32), (3, 256), (1, 16))):
        shape = (256, channels, size, size)
        x, padded = meta(*shape), maps(8, size, dtype)
        index = meta(256, dtype=torch.int64)
        rows = Rows(meta(9, 12), meta(9, 2, dtype=torch.int64), meta(1, dtype=torch.int32))
        always = {
            "seeds": index, "samples": index, "nonfinite": meta(256, dtype=torch.int32),
        }  # fmt: skip
        variants: dict[str, tuple[Tensor | None, dict[str, Any]]] = {
            "": (None, {}),
            " history": (x, {}),
            " mask": (None, {"mask": meta(*shape, dtype=torch.bool), "known": x}),
            " second noise": (None, {"noise_weights": meta(256, 2)}),
        }
        for variant, (h, options) in variants.items():
            for layout, f in (("nhwc8", padded[:, :channels]), ("nchw", meta(*shape, dtype=dtype))):
                net_input = padded if layout == "nhwc8" else f
                call = functools.partial(
                    sampler_update_, x, f, h, rows, net_input=net_input, **always, **options
                )
                yield f"sampler_update{variant} {layout} {TYPES[dtype]} {label(x)}", call
    yield "advance", functools.partial(advance, rows)
    for size in (32, 256):
        noise, key = meta(256, 3, size, size), (index, index)
        for kind in (fill.uniform_, fill.normal_):
            call = functools.partial(kind, noise, *key, stream=1, step=0)
            yield f"{kind.__name__} {label(noise)}", call


def epilogues() -> Iterator[Case]:
    for dtype in FLOATS:
        for channels, size in MAPS[:2]:
            x, small = maps(channels, size, dtype), maps(channels, size // 2, dtype)
            bias = meta(channels)
            for call in (
                functools.partial(add_elu.elu, x),
                functools.partial(add_elu.add, x, x),
                functools.partial(add_elu.add_elu, x, x),
                functools.partial(add_elu.add_bias, x, bias),
                functools.partial(pool5.max_pool5, x),
                functools.partial(pool5.avg_pool5, x),
                functools.partial(mean_pool2.mean_pool2, x),
                functools.partial(resize_add.resize_add, small, (size, size), x),
            ):
                yield f"{call.func.__name__} {label(x)}", call
            for call in (
                functools.partial(add_elu.elu, x, bias=bias),
                functools.partial(add_elu.add, x, x, bias=bias),
                functools.partial(add_elu.add_elu, x, x, bias=bias),
            ):
                yield f"{call.func.__name__} with bias {label(x)}", call
            three = functools.partial(add_elu.pointwise, [x, x, x], bias, x, x)
            yield f"pointwise of three with bias {label(x)}", three
            weighted = functools.partial(three, activation="silu", weights=[0.7] * 3)
            yield f"pointwise of three, weighted, silu, with bias {label(x)}", weighted
            for name in ("none", "silu", "gelu"):
                moved = functools.partial(group.scale_shift, x, meta(256, 3, channels), name)
                yield f"scale_shift {name} {label(x)}", moved
        x = maps(48, 32, dtype)  # channels that are no power of two
        yield f"add with bias {label(x)}", functools.partial(add_elu.add, x, x, bias=meta(48))


def odd() -> Iterator[Case]:
    """Yields launches with arguments of 1, which the JIT makes constants (without `.to`, say)."""
    index, call = meta(1, dtype=torch.int64), functools.partial
    rows = Rows(meta(1, 12), meta(1, 2, dtype=torch.int64), meta(1, dtype=torch.int32))
    for c, height, width in ((1, 1, 1), (8, 1, 1), (3, 7, 1), (3, 1, 2), (3, 8, 12)):
        x = meta(1, c, height, width).contiguous(memory_format=torch.channels_last)
        double, name = meta(1, c, 2 * height, 2 * width), f"odd {c}x{height}x{width}"
        double, p = double.contiguous(memory_format=torch.channels_last), [meta(1, c)] * 3
        for form in ("split", "single"):
            yield f"{name} norm {form}", call(norm.instance_norm_plus, x, *p, form=form)
            named = {"gamma": meta(c), "beta": meta(c), "add": p[0], "scale": p[0], "shift": p[0]}
            silu = call(group.group_norm, x, 1, **named, activation="silu")
            if form == "split" or group.fits_single(c, 1):
                yield f"{name} group norm {form}", call(silu, form=form)
        shared = [meta(c)] * 3
        yield f"{name} backward", call(backward.instance_norm_plus_backward, x, x, *shared)
        yield f"{name} pointwise", call(add_elu.pointwise, [x, x, x], meta(c), x, x)
        yield f"{name} max_pool5", call(pool5.max_pool5, x)
        yield f"{name} mean_pool2", call(mean_pool2.mean_pool2, double)
        yield f"{name} resize_add", call(resize_add.resize_add, x, (2 * height, 2 * width), double)
        yield f"{name} resize_add to it", call(resize_add.resize_add, double, (height, width), x)
        yield f"{name} fill", call(fill.normal_, meta(1, c), index, index, stream=1, step=1)
        state, padded = meta(1, c, height, width), meta(1, c + 2, height, width)
        for kind in (torch.contiguous_format, torch.channels_last):
            net = padded.contiguous(memory_format=kind)
            update = call(sampler_update_, state, x, None, rows, seeds=index, samples=index,
                          net_input=net)  # fmt: skip
            yield f"{name} update {kind}", update


def cases() -> Iterator[Case]:
    """Yields name and call of every launch that production makes, and of the odd ones."""
    yield from itertools.chain(norms(), group_norms(), updates(), epilogues(), odd())


# Kernels that dominate the time of a sampling step in bfloat16.
MAIN = (
    "instance_norm_plus split elu bf16 128x32x32", "instance_norm_plus single elu bf16 256x16x16",
    "instance_norm_plus split elu with bias bf16 128x32x32",
    "instance_norm_plus single elu with bias bf16 256x16x16",
    "group_norm split silu bf16 128x32x32", "group_norm single silu bf16 256x16x16",
    "group_norm split modulated silu bf16 128x32x32",
    "sampler_update nhwc8 bf16 fp32 3x32x32", "sampler_update nchw fp32 fp32 3x32x32",
    "normal_ fp32 3x32x32", "elu bf16 256x16x16", "add_elu bf16 256x16x16",
    "add_bias bf16 256x16x16", "add_elu with bias bf16 256x16x16",
    "max_pool5 bf16 256x16x16", "mean_pool2 bf16 256x16x16", "resize_add bf16 128x32x32",
)  # fmt: skip


def recorded(call: Callable[[], object]) -> list[Launch]:
    """Returns the launches that `call` would make."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: tuple[int], warmup: bool, **options: Any) -> None:
        assert grid[0] > 0
        launches.append((kernel, args, options))

    with mock.patch.object(triton.JITFunction, "run", record):
        call()
    return launches


def is_one(value: object) -> bool:
    return isinstance(value, int) and value == 1


def source(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """Returns the kernel with its arguments specialised like the JIT does."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    given = dict(zip(kernel.arg_names, args, strict=False)) | constants
    assert set(given) == set(kernel.arg_names), set(given) ^ set(kernel.arg_names)
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        special = not parameter.do_not_specialize and not parameter.is_constexpr
        if parameter.is_constexpr or value is None or (special and is_one(value)):
            signature[name], constexprs[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if special and aligned:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def accesses(ptx: str, kind: str) -> dict[str, int]:
    """Counts global loads ("ld") or stores ("st") by bytes per access."""
    found: Counter[str] = Counter()
    for vector, bits in re.findall(rf"{kind}\.global(?:\.[a-z_]\w*)*?(?:\.v(\d))?\.b(\d+)", ptx):
        found[str(int(vector or 1) * int(bits) // 8)] += 1
    return dict(sorted(found.items()))


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Compiles one kernel and returns its report."""
    names = set(kernel.arg_names)
    constants = {name: value for name, value in options.items() if name in names}
    compiler = {name: value for name, value in options.items() if name not in names}
    binary = triton.compile(
        source(kernel, args, constants),
        target=TARGET,
        options=compiler,
    )
    assert binary.asm["cubin"].startswith(b"\x7fELF")
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        log = subprocess.run(
            [PTXAS, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    pattern = r"(\d+) bytes stack.* (\d+) bytes spill st.* (\d+) bytes spill"
    stack, stores, loads = map(int, re.search(pattern, log).groups())
    return {
        "kernel": kernel.__name__,
        "warps": options["num_warps"],
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "stack_bytes": stack,
        "spill_bytes": stores + loads,
        "shared_bytes": binary.metadata.shared,
        "scratch_bytes": binary.metadata.global_scratch_size,
        "load_bytes": accesses(ptx, "ld"),
        "store_bytes": accesses(ptx, "st"),
    }


def report(only_main: bool = False) -> dict[str, Any]:
    kernels = {}
    for name, call in cases():
        if only_main and name not in MAIN and not name.startswith("odd"):
            continue
        for started in recorded(call):
            kernels[f"{name}: {started[0].__name__}"] = compiled(*started)
    version = subprocess.run([PTXAS, "--version"], check=True, capture_output=True, text=True)
    return {
        "target": "sm_90a",
        "triton": triton.__version__,
        "ptxas": re.search(r"V([\d.]+)", version.stdout)[1],
        "kernels": kernels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--only-main", action="store_true", help="a few cases of the hot path")
    options = parser.parse_args()
    found = report(options.only_main)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    worst = max(found["kernels"].values(), key=lambda kernel: kernel["registers"])
    spilling = [name for name, kernel in found["kernels"].items() if kernel["spill_bytes"]]
    print(f"{len(found['kernels'])} kernels, at most {worst['registers']} registers a thread")
    print(f"spilling: {spilling or 'none'}")


if __name__ == "__main__":
    main()
