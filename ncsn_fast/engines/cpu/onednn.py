"""oneDNN's convolutions inside libtorch: packed weights, and the function that adds a convolution.

All of it is private to torch, so this is the only module that uses it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from ncsn_fast.engines.base import DTYPES
from ncsn_fast.engines.lowering.graph import ConvolutionSpec

_FUNCTIONS = (
    "aoti_torch_cpu_mkldnn__convolution_pointwise_binary_",
    "aoti_torch_delete_tensor_object",
)
# Environment variables that limit oneDNN's instruction set.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@functools.cache
def functions() -> tuple[int, ...]:
    """Returns the addresses of the functions of libtorch's C interface that a plan calls.

    Raises:
        RuntimeError: this torch has no oneDNN, or does not export them.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("this build of torch has no oneDNN")
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        library = ctypes.CDLL(str(path))
        if all(hasattr(library, name) for name in _FUNCTIONS):
            return tuple(
                ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
                for name in _FUNCTIONS
            )
    raise RuntimeError(f"torch {torch.__version__} does not export {' and '.join(_FUNCTIONS)}")


@functools.cache
def lacks(dtype: str) -> str | None:
    """Returns why oneDNN cannot convolve in a dtype on this machine; None where it can.

    bfloat16 needs AVX-512 (BW, VL and DQ) or AVX-NE-CONVERT, as far as the environment allows them;
    torch raises when it packs a weight otherwise.
    """
    small = ConvolutionSpec(torch.zeros(16, 16, 3, 3))
    try:
        pack(small, (1, 16, 8, 8), DTYPES[dtype])
    except RuntimeError as error:
        (reason, *_), limits = str(error).splitlines(), [n for n in LIMITS if n in os.environ]
        allowed = "".join(f"; the environment sets {n}={os.environ[n]}" for n in limits)
        return f"oneDNN has no {dtype} convolutions for this processor ({reason}{allowed})"
    return None


def pack(spec: ConvolutionSpec, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Returns a convolution's weight, packed for inputs of a shape, and its bias if it has one.

    Raises:
        RuntimeError: oneDNN has no convolutions of this dtype here.
    """
    weight = torch.ops.mkldnn._reorder_convolution_weight(
        spec.kernel().to("cpu", dtype).contiguous(), [spec.padding] * 2, [spec.stride] * 2,
        [spec.dilation] * 2, 1, list(shape),
    )  # fmt: skip
    bias = (
        [] if spec.bias is None else [spec.bias.detach().to("cpu", dtype, copy=True).contiguous()]
    )
    return [weight, *bias]
