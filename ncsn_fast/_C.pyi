# The compiled extension (csrc/bindings.cpp). A tensor is an array, (address, bytes), as
# ncsn_fast.ops.addresses has it; (0, 0) where there is none. Some kernels write a map whose pixels
# begin `row` elements apart: (address, bytes, row).
from collections.abc import Callable, Sequence
from typing import Any

Array = tuple[int, int]

def build_info() -> dict[str, Any]: ...
def isa_levels() -> list[str]: ...
def default_isa() -> str: ...
def set_num_threads(threads: int) -> None: ...
def cuda_device_count() -> int: ...
def philox_words(
    out: Array, samples: Array, batch: int, numel: int, seed: int, stream: int, step: int,
    isa: int = -1,
) -> None: ...  # fmt: skip
def uniform(
    out: Array, samples: Array, batch: int, numel: int, seed: int, stream: int, step: int,
    isa: int = -1,
) -> None: ...  # fmt: skip
def normal(
    out: Array, samples: Array, batch: int, numel: int, seed: int, stream: int, step: int,
    isa: int = -1,
) -> None: ...  # fmt: skip
def box_muller(out: Array, words: Array, pairs: int, isa: int = -1) -> None: ...
def instance_norm_plus(
    x: Array, y: Array, alpha: Array, gamma: Array, beta: Array, batch: int, channels: int,
    plane: int, channels_last: bool, per_sample: bool, in_bfloat16: bool, out_bfloat16: bool,
    elu: bool, eps: float, strip_sums: Array, width: int, border: int, isa: int, /,
) -> None: ...  # fmt: skip
def zero_around(y: Array, nhwc: Sequence[int], border: int, isa: int, /) -> None: ...
def sampler_update(
    x: Array, f: Array, h: Array, batch: int, channels: int, plane: int, f_bfloat16: bool,
    f_channels_last: bool, coefficients: Sequence[float], seed: int, samples: Array, step: int,
    noise_weights: Array, mask: Array, known: Array, c_ref: float, ref_step: int, net_input: Array,
    net_bfloat16: bool, net_channels_last: bool, scale: float, shift: float, nonfinite: Array,
    isa: int, /,
) -> None: ...  # fmt: skip
def add_elu(
    a: Array, b: Array, sum: Array, y: Array, count: int, bfloat16: bool, isa: int, /
) -> None: ...
def add_activation(
    a: Array, b: Array, sum: Array, y: Array, pixels: int, channels: int, bfloat16: bool,
    activation: int, a_weight: float, b_weight: float, nhwc: Sequence[int], border: int,
    isa: int, /,
) -> None: ...  # fmt: skip
def group_norm(
    x: Array, y: Array, gamma: Array, beta: Array, add: Array, scale: Array, shift: Array,
    batch: int, channels: int, plane: int, groups: int, channels_last: bool, in_bfloat16: bool,
    out_bfloat16: bool, activation: int, eps: float, strip_sums: Array, width: int, border: int,
    isa: int, /,
) -> None: ...  # fmt: skip
def scale_shift(
    x: Array, y: Array, scale: Array, shift: Array, batch: int, channels: int, plane: int,
    channels_last: bool, in_bfloat16: bool, out_bfloat16: bool, activation: int, isa: int, /,
) -> None: ...  # fmt: skip
def channel_moments(
    x: Array, moments: Array, sizes: Sequence[int], channels_last: bool, bfloat16: bool, isa: int, /
) -> None: ...
def norm_gradient(
    x: Array, grad: Array, rows: Array, sums: Array, out: Array, sizes: Sequence[int],
    channels_last: bool, bfloat16: bool, activation: int, isa: int, /,
) -> None: ...  # fmt: skip
def copy_channels(
    x: Array, y: Array, pixels: int, channels: int, x_channels: int, x_first: int, y_channels: int,
    y_first: int, in_bfloat16: bool, out_bfloat16: bool, isa: int, /,
) -> None: ...  # fmt: skip
def upsample_nearest(
    x: Array, y: Array, nhwc: Sequence[int], rows: int, columns: int, bfloat16: bool, isa: int, /
) -> None: ...
def depth_to_space(
    z: Array, y: Array, nhwc: Sequence[int], out_height: int, out_width: int, factor: int,
    first: int, bfloat16: bool, isa: int, /,
) -> None: ...  # fmt: skip
def softmax(
    x: Array, rows: int, columns: int, scale: float, bfloat16: bool, isa: int, /
) -> None: ...
def depthwise_transposed(
    x: Array, weight: Array, bias: Array, y: Array, nhwc: Sequence[int], out_height: int,
    out_width: int, taps: int, stride: int, padding: int, bfloat16: bool, isa: int, /,
) -> None: ...  # fmt: skip
def attention(
    q: Array, k: Array, v: Array, out: Array, sizes: Sequence[int], q_layout: Sequence[int],
    k_layout: Sequence[int], v_layout: Sequence[int], out_layout: Sequence[int], scale: float,
    bfloat16: bool, isa: int, /,
) -> None: ...  # fmt: skip
def max_pool5(
    x: Array, y: Array, nhwc: Sequence[int], bfloat16: bool, border: int, isa: int, /
) -> None: ...
def avg_pool5(
    x: Array, y: Array, nhwc: Sequence[int], bfloat16: bool, border: int, isa: int, /
) -> None: ...
def mean_pool2(
    a: Array, b: Array, y: Array, nhwc: Sequence[int], bfloat16: bool, isa: int, /
) -> None: ...
def resize_add(
    x: Array, a: Array, y: Array, nhwc: Sequence[int], out_height: int, out_width: int,
    bfloat16: bool, isa: int, /,
) -> None: ...  # fmt: skip
def norm_tiles(channels: int, plane: int, dtype: int, /) -> int: ...
def convert_float16(values: Array, halves: Array, count: int, widen: bool, /) -> None: ...

# ncsn_fast.ops.native; x and y of a norm are (array, dtype), its parameters (array, floats between
# rows), maps of an update (array, (dtype, strides of sample, channel, pixel, channels)), its rows
# (table, steps, counter, count).
Typed = tuple[Array, int]
Strided = tuple[Array, tuple[int, int, int, int, int]]
Table = tuple[Array, Array, Array, int]

def instance_norm_plus_rows(
    x: Typed, y: Typed, sizes: Sequence[int], parameters: Sequence[Typed], bias: Array, elu: bool,
    eps: float, isa: int, /,
) -> None: ...  # fmt: skip
def emulated_instance_norm_plus(
    x: Typed, y: Typed, sizes: Sequence[int], parameters: Sequence[Typed], bias: Array, elu: bool,
    eps: float, partials: Array, single: bool, backward: bool, /,
) -> None: ...  # fmt: skip
def instance_norm_plus_cuda(
    x: Typed, y: Typed, sizes: Sequence[int], parameters: Sequence[Typed], bias: Array, elu: bool,
    eps: float, partials: Array, single: bool, stream: int, /,
) -> None: ...  # fmt: skip
def emulated_group_norm(
    x: Typed, y: Typed, sizes: Sequence[int], groups: int, parameters: Sequence[Array],
    activation: int, eps: float, partials: Array, coefficients: Array, backward: bool, /,
) -> None: ...  # fmt: skip
def group_norm_cuda(
    x: Typed, y: Typed, sizes: Sequence[int], groups: int, parameters: Sequence[Array],
    activation: int, eps: float, partials: Array, coefficients: Array, stream: int, /,
) -> None: ...  # fmt: skip
def sampler_update_rows(
    x: Array, h: Array, sizes: Sequence[int], f: Strided, rows: Table, seeds: Array, samples: Array,
    noise_weights: Array, mask: Array, known: Array, net_input: Strided, scale: float, shift: float,
    nonfinite: Array, isa: int, /,
) -> None: ...  # fmt: skip
def emulated_sampler_update(
    x: Array, h: Array, sizes: Sequence[int], f: Strided, rows: Table, seeds: Array, samples: Array,
    noise_weights: Array, mask: Array, known: Array, net_input: Strided, scale: float, shift: float,
    nonfinite: Array, backward: bool, /,
) -> None: ...  # fmt: skip
def sampler_update_rows_cuda(
    x: Array, h: Array, sizes: Sequence[int], f: Strided, rows: Table, seeds: Array, samples: Array,
    noise_weights: Array, mask: Array, known: Array, net_input: Strided, scale: float, shift: float,
    nonfinite: Array, stream: int, /,
) -> None: ...  # fmt: skip

class Plan:
    """Steps on planned buffers. A kernel's method takes the kernel's arguments, but for isa."""

    def __init__(
        self, convolution_add: int, product_add: int, products: int, release: int, /
    ) -> None: ...
    def convolution(self, *arguments: Any) -> None: ...
    def product(self, *arguments: Any) -> None: ...
    def callback(self, function: Callable[[], object], /) -> None: ...
    def instance_norm_plus(self, *arguments: Any) -> None: ...
    def zero_around(self, *arguments: Any) -> None: ...
    def add_elu(self, *arguments: Any) -> None: ...
    def add_activation(self, *arguments: Any) -> None: ...
    def group_norm(self, *arguments: Any) -> None: ...
    def scale_shift(self, *arguments: Any) -> None: ...
    def copy_channels(self, *arguments: Any) -> None: ...
    def upsample_nearest(self, *arguments: Any) -> None: ...
    def depth_to_space(self, *arguments: Any) -> None: ...
    def softmax(self, *arguments: Any) -> None: ...
    def depthwise_transposed(self, *arguments: Any) -> None: ...
    def attention(self, *arguments: Any) -> None: ...
    def max_pool5(self, *arguments: Any) -> None: ...
    def avg_pool5(self, *arguments: Any) -> None: ...
    def mean_pool2(self, *arguments: Any) -> None: ...
    def resize_add(self, *arguments: Any) -> None: ...
    def winograd_conv(self, *arguments: Any) -> None: ...
    def tile_conv(self, *arguments: Any) -> None: ...
    def level_parameters(
        self, table: Array, levels: int, batch: int, channels: int, alpha: Array, gamma: Array,
        beta: Array, /,
    ) -> None: ...  # fmt: skip
    def set_levels(self, levels: Array, batch: int, /) -> None: ...
    def run(self, isa: int, /) -> None: ...
    def profile(self, isa: int, /) -> list[float]: ...
    def sample(self, *arguments: Any) -> None: ...
    def __len__(self) -> int: ...

def winograd_sizes(in_channels: int, out_channels: int, /) -> tuple[int, int]: ...
def winograd_pack(
    weight: Array, values: Array, scales: Array, in_channels: int, out_channels: int,
    bfloat16: bool, /,
) -> None: ...  # fmt: skip
def winograd_conv(
    x: Array, values: Array, scales: Array, bias: Array, added: Array, out: Array,
    nhwc: Sequence[int], out_channels: int, dilation: int, bfloat16: bool, isa: int, /,
) -> None: ...  # fmt: skip
def amx_state() -> tuple[bool, bool, bool, int]: ...
def tile_product(sum: Array, a: Array, b: Array, strides: Sequence[int], isa: int, /) -> None: ...
def tile_conv_values(in_channels: int, out_channels: int, taps: int, /) -> int: ...
def padded_map(nhwc: Sequence[int], border: int, /) -> tuple[int, int, int, int, int]: ...
def strips(height: int, width: int, /) -> tuple[int, int]: ...
def tile_pack(
    weight: Array, values: Array, in_channels: int, out_channels: int, taps: int, /
) -> None: ...
def tile_conv(
    x: Array, values: Array, bias: Array, added: Array, sum: Array, y: Array, strip_sums: Array,
    nhwc: Sequence[int], out_channels: int, taps: int, dilation: int, activation: int, border: int,
    y_border: int, isa: int, /,
) -> None: ...  # fmt: skip
def sampler_update_cuda(
    x: Array, f: Array, h: Array, batch: int, channels: int, plane: int, f_bfloat16: bool,
    f_channels_last: bool, coefficients: Sequence[float], seed: int, samples: Array, step: int,
    noise_weights: Array, mask: Array, known: Array, c_ref: float, ref_step: int, net_input: Array,
    net_bfloat16: bool, net_channels_last: bool, scale: float, shift: float, nonfinite: Array,
    stream: int, /,
) -> None: ...  # fmt: skip
