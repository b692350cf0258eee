"""The Triton kernels on the CPU, in Triton's interpreter."""

import triton_common


@triton_common.needs_triton
def test_cases_in_the_interpreter():
    triton_common.run_cases(
        "triton_norm_cases.py", "triton_update_cases.py", "triton_epilogue_cases.py",
        "triton_fill_cases.py", "triton_ops_cases.py", "triton_engine_cases.py",
        interpreted=True,
    )  # fmt: skip
