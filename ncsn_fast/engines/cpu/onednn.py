"""oneDNN's convolutions and products inside libtorch, and packed weights.

All of it is private to torch, so this is the only module that uses it, and it trusts nothing: names
are looked up, and with a torch that the tests have not run, the operators' schemas are compared and
every function is tried in a child process before this one calls an address. The verdict is
remembered.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsn_fast.data import files
from ncsn_fast.data.json_file import find_json
from ncsn_fast.engines.lowering.graph import ConvolutionSpec
from ncsn_fast.notices import notice
from ncsn_fast.ops.addresses import NHWC, array
from ncsn_fast.ops.extension import _C

log = logging.getLogger(__name__)
TESTED = ("2.13.", "2.14.")  # releases of torch that the tests have run with
_FUNCTIONS = (
    "aoti_torch_cpu_mkldnn__convolution_pointwise_binary_",
    "aoti_torch_cpu_addmm_out",
    "aoti_torch_cpu_bmm_out",
    "aoti_torch_delete_tensor_object",
)
_PACK, _ADD = "_reorder_convolution_weight", "_convolution_pointwise_"
# The C function has the arguments of its operator, in this order, but for an `out`, which is first.
_SCHEMAS = {
    ("mkldnn", _PACK, "default"): (
        "(Tensor self, int[2] padding=0, int[2] stride=1, int[2] dilation=1, int groups=1, "
        "int[]? input_size=None) -> Tensor Y"
    ),
    ("mkldnn", _ADD, "binary"): (
        "(Tensor(a!) other, Tensor X, Tensor W, Tensor? B, int[] padding, int[] stride, "
        "int[] dilation, int groups, str binary_attr, Scalar? alpha, str? unary_attr, "
        "Scalar?[] unary_scalars, str? unary_algorithm) -> Tensor(a!) Y"
    ),
    ("aten", "addmm", "out"): (
        "(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1, Tensor(a!) out) "
        "-> Tensor(a!)"
    ),
    ("aten", "bmm", "out"): "(Tensor self, Tensor mat2, *, Tensor(a!) out) -> Tensor(a!)",
}
# Environment variables that limit oneDNN's instruction set.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_PATIENCE = 120.0  # seconds for the child process, most of which imports torch


@functools.cache
def problem() -> str | None:
    """Returns why plans cannot use this torch's convolutions, and the remedy; None if they can."""
    reason: str | None = None
    try:
        _found()
    except RuntimeError as error:
        reason = str(error)
    if reason is None and not torch.__version__.startswith(TESTED):
        reason = _changed_schema() or _verdict()
    return f"{reason}; install torch {TESTED[-1]}*, which the tests have run" if reason else None


def addresses() -> tuple[int, ...]:
    """Returns the addresses of the functions of libtorch's C interface that a plan calls.

    Raises:
        RuntimeError: they cannot be used; see `problem`.
    """
    if (reason := problem()) is not None:
        raise RuntimeError(reason)
    return _found()


@functools.cache
def _found() -> tuple[int, ...]:
    """Looks the addresses up, and whether everything else is there.

    Raises:
        RuntimeError: this torch has no oneDNN, or lacks one of the private names.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("this build of torch has no oneDNN")
    missing = [name for name in (_PACK, _ADD) if not hasattr(torch.ops.mkldnn, name)]
    if not callable(_capsules()):
        missing.append("torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors")
    found: tuple[int, ...] = ()
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        library = ctypes.CDLL(str(path))
        if all(hasattr(library, name) for name in _FUNCTIONS):
            pointers = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _FUNCTIONS]
            found = tuple(pointer.value or 0 for pointer in pointers)
    if missing or not found:
        names = " and ".join(missing or _FUNCTIONS)
        raise RuntimeError(f"torch {torch.__version__} does not have {names}")
    return found


def _capsules() -> Any:
    module = getattr(torch._C, "_aoti", None)
    return getattr(module, "unsafe_alloc_void_ptrs_from_tensors", None)


def owned(tensors: list[Tensor]) -> list[Any]:
    """Returns capsules of owned references to tensors, which the plan that takes them releases."""
    return list(_capsules()(tensors))


def _changed_schema() -> str | None:
    """Returns which operator takes other arguments than ours; None if all are the same."""
    for (library, name, overload), expected in _SCHEMAS.items():
        operator = getattr(getattr(getattr(torch.ops, library), name), overload, None)
        found = str(getattr(operator, "_schema", "no schema"))
        if not found.endswith(expected):
            return f"torch {torch.__version__} has {library}.{name} with other arguments: {found}"
    return None


def _verdict() -> str | None:
    """Returns why the trial in a child process failed; None if it passed. Remembers the result."""
    facts = [_C.build_info()["version"], torch.__version__, str(torch.version.git_version)]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    path = files.cache_folder() / f"torch-{key}.json"
    known = find_json(path)
    if known is not None and isinstance(known.get("failure", 0), str | None):
        return known["failure"]
    log.info("torch %s is new to this version: trying a convolution", torch.__version__)
    failure, lasting = _try_in_child()
    if not lasting:
        return failure
    try:
        with files.atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"torch": torch.__version__, "failure": failure}))
    except OSError as error:
        notice(log, "%s; torch is tried again next time", error)
    return failure


def _try_in_child() -> tuple[str | None, bool]:
    """Returns why the trial failed, if it did, and whether it would do the same again."""
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from ncsn_fast.engines.cpu import onednn; onednn.trial()"
    )
    what = f"a trial of the convolutions of torch {torch.__version__} in a child process"
    try:
        child = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True, text=True, timeout=_PATIENCE, check=False,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"{what} did not end: {error}", False
    if child.returncode == 0:
        return None, True
    if child.returncode < 0:
        stopped = -child.returncode in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        return f"{what} crashed (signal {-child.returncode})", not stopped
    last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return f"{what} failed: {last}", True


def trial() -> None:
    """Calls every function as plans do, and compares the results with torch's public functions.

    Raises:
        RuntimeError: they differ.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, total = (numbers(2, 16, n, n) for n in (8, 6))
    spec = ConvolutionSpec(numbers(16, 16, 3, 3), torch.ones(16), padding=1, dilation=2)
    convolved = total + F.conv2d(x, spec.weight, spec.bias, padding=1, dilation=2)
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, total))
    a, b, added, out = numbers(6, 5), numbers(5, 7), numbers(6, 7), torch.zeros(6, 7)
    left, right, each = numbers(3, 2, 6, 5), numbers(3, 2, 5, 7), torch.zeros(3, 2, 6, 7)
    plan = _C.Plan(*_found())
    add(plan, "trial", spec, x, pack(spec, tuple(x.shape), torch.float32), y, clear=False)
    product(plan, "trial", a, b, out, added)
    products(plan, "trial", left, right, each)
    plan.run(-1)
    for found, expected in ((y, convolved), (out, added + a @ b), (each, left @ right)):
        error = float((found - expected).abs().max())
        if not error <= 1e-4 * float(expected.abs().max()):
            raise RuntimeError(f"its sum is off by {error:.2g}")


def add(
    plan: Any,
    name: str,
    spec: ConvolutionSpec,
    x: Tensor,
    packed: list[Tensor],
    y: Tensor,
    *,
    clear: bool,
) -> None:
    """Appends the step y += convolution of x to a plan; with `clear`, y = convolution of x.

    Args:
        x, y: channels-last maps, which the caller keeps at their addresses.
        packed: of `pack`.
    """  # fmt: skip
    capsules = owned([y, x, *packed])
    bias = None if spec.bias is None else capsules.pop()
    plan.convolution(
        name, *capsules, bias, (spec.padding,) * 2, (spec.stride,) * 2, (spec.dilation,) * 2,
        spec.groups, array("y", y, tuple(y.shape), y.dtype, layout=NHWC), y.nbytes if clear else 0,
    )  # fmt: skip


def products(plan: Any, name: str, a: Tensor, b: Tensor, y: Tensor) -> None:
    """Appends the steps y = a b of (N, heads, L, K) and (N, heads, K, M), one for each head.

    The caller keeps the tensors at their addresses; all are of one type, with any strides.
    """
    for head in range(y.shape[1]):
        out, *operands = owned([y[:, head], a[:, head], b[:, head]])
        plan.product(name, out, None, *operands)


def product(plan: Any, name: str, a: Tensor, b: Tensor, y: Tensor, added: Tensor) -> None:
    """Appends the step y = added + a b of matrices (L, K) and (K, M); `added` may be (M,), or y."""
    plan.product(name, *owned([y, added, a, b]))


@functools.cache
def lacks(dtype: torch.dtype) -> str | None:
    """Returns why oneDNN cannot convolve in a dtype on this machine; None where it can.

    bfloat16 needs AVX-512 (BW, VL and DQ) or AVX-NE-CONVERT, as far as the environment allows them;
    torch raises when it packs a weight otherwise. What `problem` says is no matter of a dtype.
    """
    if problem() is not None:
        return None
    small = ConvolutionSpec(torch.zeros(16, 16, 3, 3))
    try:
        pack(small, (1, 16, 8, 8), dtype)
    except RuntimeError as error:
        (reason, *_), limits = str(error).splitlines(), [n for n in LIMITS if n in os.environ]
        allowed = "".join(f"; the environment sets {n}={os.environ[n]}" for n in limits)
        name = str(dtype).removeprefix("torch.")
        return f"oneDNN has no {name} convolutions for this processor ({reason}{allowed})"
    return None


def pack(spec: ConvolutionSpec, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Returns a convolution's weight, packed for inputs of a shape, and its bias if it has one.

    Raises:
        RuntimeError: oneDNN has no convolutions of this dtype here.
    """
    weight = getattr(torch.ops.mkldnn, _PACK)(
        spec.kernel().to("cpu", dtype).contiguous(), [spec.padding] * 2, [spec.stride] * 2,
        [spec.dilation] * 2, spec.groups, list(shape),
    )  # fmt: skip
    bias = (
        [] if spec.bias is None else [spec.bias.detach().to("cpu", dtype, copy=True).contiguous()]
    )
    return [weight, *bias]
