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
def norm_tiles(channels: int, plane: int, dtype: int, /) -> int: ...
def convert_float16(values: int, halves: int, count: int, widen: bool, /) -> None: ...

# ncsn_fast.ops.native; x and y of a norm are (address, dtype), its parameters (address, floats
# between rows), maps of an update (address, dtype, strides of sample, channel, pixel, channels).
def instance_norm_plus_rows(
    x: Sequence[int], y: Sequence[int], sizes: Sequence[int], parameters: Sequence[Sequence[int]],
    bias: int, elu: bool, eps: float, isa: int, /,
) -> None: ...  # fmt: skip
def emulated_instance_norm_plus(
    x: Sequence[int], y: Sequence[int], sizes: Sequence[int], parameters: Sequence[Sequence[int]],
    bias: int, elu: bool, eps: float, partials: int, single: bool, backward: bool, /,
) -> None: ...  # fmt: skip
def instance_norm_plus_cuda(
    x: Sequence[int], y: Sequence[int], sizes: Sequence[int], parameters: Sequence[Sequence[int]],
    bias: int, elu: bool, eps: float, partials: int, single: bool, stream: int, /,
) -> None: ...  # fmt: skip
def sampler_update_rows(
    x: int, h: int, sizes: Sequence[int], f: Sequence[int], rows: Sequence[int], seeds: int,
    samples: int, noise_weights: int, mask: int, known: int, net_input: Sequence[int], scale: float,
    shift: float, nonfinite: int, isa: int, /,
) -> None: ...  # fmt: skip
def emulated_sampler_update(
    x: int, h: int, sizes: Sequence[int], f: Sequence[int], rows: Sequence[int], seeds: int,
    samples: int, noise_weights: int, mask: int, known: int, net_input: Sequence[int], scale: float,
    shift: float, nonfinite: int, backward: bool, /,
) -> None: ...  # fmt: skip
def sampler_update_rows_cuda(
    x: int, h: int, sizes: Sequence[int], f: Sequence[int], rows: Sequence[int], seeds: int,
    samples: int, noise_weights: int, mask: int, known: int, net_input: Sequence[int], scale: float,
    shift: float, nonfinite: int, stream: int, /,
) -> None: ...  # fmt: skip

class Plan:
    """Steps on planned buffers. A kernel's method takes the kernel's arguments, but for isa."""

    def __init__(self, convolution_add: int, release: int, /) -> None: ...
    def convolution(self, *arguments: Any) -> None: ...
    def instance_norm_plus(self, *arguments: Any) -> None: ...
    def add_elu(self, *arguments: Any) -> None: ...
    def max_pool5(self, *arguments: Any) -> None: ...
    def avg_pool5(self, *arguments: Any) -> None: ...
    def mean_pool2(self, *arguments: Any) -> None: ...
    def resize_add(self, *arguments: Any) -> None: ...
    def winograd_conv(self, *arguments: Any) -> None: ...
    def level_parameters(
        self, table: int, levels: int, channels: int, alpha: int, gamma: int, beta: int, /
    ) -> None: ...
    def set_levels(self, levels: int, batch: int, /) -> None: ...
    def run(self, isa: int, /) -> None: ...
    def profile(self, isa: int, /) -> list[float]: ...
    def sample(self, *arguments: Any) -> None: ...
    def __len__(self) -> int: ...

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
