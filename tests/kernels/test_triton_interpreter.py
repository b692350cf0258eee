"""The Triton kernels on the CPU, in Triton's interpreter."""

import pytest
import triton_common

# Each kernel at least once, in a few seconds.
SOME = (
    "norm::test_bias_of_degenerate_shapes",
    "group_norm::test_constant_groups_give_beta_exactly",
    "group_norm::test_nan_stays_in_its_group",
    "norm::test_gradients_do_not_depend_on_the_batch",
    "update::test_rows_and_counter",
    "update::test_second_noise",
    "group_norm::test_scale_and_shift",
    "epilogue::test_weights_and_other_activations",
    "epilogue::test_in_place_and_into_buffers",
    "epilogue::test_pools_of_infinities_and_nans",
    "fill",
    "ops::test_forward",
)


@triton_common.needs_triton
def test_some_cases_in_the_interpreter():
    triton_common.run_cases(*SOME, interpreted=True)


@pytest.mark.slow
@triton_common.needs_triton
@pytest.mark.parametrize(
    "kind", ["norm", "group_norm", "update", "epilogue", "fill", "ops", "engine"]
)
def test_cases_in_the_interpreter(kind):
    triton_common.run_cases(kind, interpreted=True)
