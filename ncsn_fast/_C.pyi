# The compiled extension (csrc/bindings.cpp). Tensors are addresses, 0 where there is none.
from collections.abc import Sequence
from typing import Any

def build_info() -> dict[str, Any]: ...
def isa_levels() -> list[str]: ...
def default_isa() -> str: ...
def cuda_device_count() -> int: ...
def philox_words(
    out: int, samples: int, batch: int, numel: int, seed: int, stream: int, step: int, isa: int = -1
) -> None: ...
def uniform(
    out: int, samples: int, batch: int, numel: int, seed: int, stream: int, step: int, isa: int = -1
) -> None: ...
def normal(
    out: int, samples: int, batch: int, numel: int, seed: int, stream: int, step: int, isa: int = -1
) -> None: ...
def box_muller(out: int, words: int, pairs: int, isa: int = -1) -> None: ...
def instance_norm_plus(
    x: int, y: int, alpha: int, gamma: int, beta: int, batch: int, channels: int, plane: int,
    channels_last: bool, per_sample: bool, in_bfloat16: bool, out_bfloat16: bool, elu: bool,
    eps: float, isa: int, /,
) -> None: ...  # fmt: skip
def sampler_update(
    x: int, f: int, h: int, batch: int, channels: int, plane: int, f_bfloat16: bool,
    f_channels_last: bool, coefficients: Sequence[float], seed: int, samples: int, step: int,
    noise_weights: int, mask: int, known: int, c_ref: float, ref_step: int, net_input: int,
    net_bfloat16: bool, net_channels_last: bool, scale: float, shift: float, nonfinite: int,
    isa: int, /,
) -> None: ...  # fmt: skip
def add_elu(a: int, b: int, sum: int, y: int, count: int, bfloat16: bool, isa: int, /) -> None: ...
def max_pool5(x: int, y: int, nhwc: Sequence[int], bfloat16: bool, isa: int, /) -> None: ...
def avg_pool5(x: int, y: int, nhwc: Sequence[int], bfloat16: bool, isa: int, /) -> None: ...
def mean_pool2(
    a: int, b: int, y: int, nhwc: Sequence[int], bfloat16: bool, isa: int, /
) -> None: ...
def resize_add(
    x: int, a: int, y: int, nhwc: Sequence[int], out_height: int, out_width: int, bfloat16: bool,
    isa: int, /,
) -> None: ...  # fmt: skip
def winograd_sizes(in_channels: int, out_channels: int, /) -> tuple[int, int]: ...
def winograd_pack(
    weight: int, values: int, scales: int, in_channels: int, out_channels: int, /
) -> None: ...
def winograd_conv(
    x: int, values: int, scales: int, bias: int, out: int, nhwc: Sequence[int], out_channels: int,
    dilation: int, accumulate: bool, bfloat16: bool, isa: int, /,
) -> None: ...  # fmt: skip
def sampler_update_cuda(
    x: int, f: int, h: int, batch: int, channels: int, plane: int, f_bfloat16: bool,
    f_channels_last: bool, coefficients: Sequence[float], seed: int, samples: int, step: int,
    noise_weights: int, mask: int, known: int, c_ref: float, ref_step: int, net_input: int,
    net_bfloat16: bool, net_channels_last: bool, scale: float, shift: float, nonfinite: int,
    stream: int, /,
) -> None: ...  # fmt: skip
