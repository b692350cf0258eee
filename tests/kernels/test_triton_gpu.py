"""The Triton kernels on a GPU: the cases of the interpreter, and those that need a device."""

import pytest
import torch
import triton_common


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and CUDA's torch")
@triton_common.needs_triton
@pytest.mark.parametrize(
    "kind", ["norm", "group_norm", "update", "epilogue", "fill", "engine", "device"]
)
def test_cases_on_the_device(kind):
    triton_common.run_cases(kind, interpreted=False)
