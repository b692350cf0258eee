"""oneDNN's convolutions, which libtorch carries: packed weights, and the function that adds one.

None of it is public in torch, so everything that a plan uses lies here.
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
# Either name caps the instructions that oneDNN uses.
_CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@functools.cache
def functions() -> tuple[int, ...]:
    """Addresses of the functions of libtorch's C interface that a plan calls.

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
    """None if oneDNN convolves maps of a type on this machine, else why it does not.

    bfloat16 asks for AVX-512 (BW, VL and DQ) or AVX-NE-CONVERT, and for the environment to allow
    it: packing a weight is where oneDNN says so.
    """
    small = ConvolutionSpec(torch.zeros(16, 16, 3, 3))
    try:
        pack(small, (1, 16, 8, 8), DTYPES[dtype])
    except RuntimeError as error:
        (reason, *_), caps = str(error).splitlines(), [n for n in _CAPS if n in os.environ]
        allowed = "".join(f"; the environment sets {n}={os.environ[n]}" for n in caps)
        return f"oneDNN has no {dtype} convolutions for this processor ({reason}{allowed})"
    return None


def pack(of: ConvolutionSpec, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """A convolution's weight in oneDNN's own layout for inputs of a shape, and its bias if any.

    Raises:
        RuntimeError: oneDNN has no convolutions of this type here.
    """
    weight = torch.ops.mkldnn._reorder_convolution_weight(
        of.kernel().to("cpu", dtype).contiguous(), [of.padding] * 2, [of.stride] * 2,
        [of.dilation] * 2, 1, list(shape),
    )  # fmt: skip
    bias = [] if of.bias is None else [of.bias.detach().to("cpu", dtype, copy=True).contiguous()]
    return [weight, *bias]
