#include "native.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "array_caster.h"
#include "cuda/kernels.h"
#include "steps.h"

namespace py = pybind11;

namespace ncsn_fast {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;
using Sizes = std::array<int64_t, 3>;           // batch, channels, plane
using Typed = std::pair<Array, int64_t>;        // memory, dtype
using Parameter = std::pair<Array, int64_t>;    // memory, floats from one sample's row to the next
using Layout = std::array<int64_t, 5>;          // dtype, strides of sample, channel, pixel; channels
using Strided = std::pair<Array, Layout>;
using Table = std::tuple<Array, Array, Array, int64_t>;  // table, steps, counter; count of rows

Dtype checked_dtype(int64_t code) {
    if (code >= 0 && code <= 2) return static_cast<Dtype>(code);
    throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16); got " +
                                std::to_string(code));
}

// The layout of a map of an update, all of whose elements lie in its memory.
MapLayout checked_layout(const char* name, const Strided& map, const Sizes& sizes) {
    const auto& [memory, numbers] = map;
    const auto [code, sample, channel, pixel, channels] = numbers;
    const MapLayout layout{checked_dtype(code), sample, channel, pixel, channels};
    const auto [batch, own_channels, plane] = sizes;
    if (channels < own_channels) {
        throw std::invalid_argument(std::string(name) + " must have at least " + std::to_string(own_channels) +
                                    " channels; got " + std::to_string(channels));
    }
    if (batch == 0 || channels == 0 || plane == 0) return layout;
    const int64_t last = checked_count({{"samples", batch - 1}, {"stride", sample}}) +
                         checked_count({{"channels", channels - 1}, {"stride", channel}}) +
                         checked_count({{"pixels", plane - 1}, {"stride", pixel}});
    required(name, memory, last + 1, layout.dtype);
    return layout;
}

const float* checked_rows(const char* name, const Parameter& parameter, int64_t batch, int64_t channels) {
    const auto& [memory, row] = parameter;
    const int64_t rows = checked_count({{"samples", std::max<int64_t>(batch - 1, 0)}, {"stride", row}});
    return required<const float>(name, memory, rows + channels);
}

NormArgs norm_args(const Typed& x, const Typed& y, const Sizes& sizes,
                   const std::array<Parameter, 3>& parameters, const Array& bias, bool elu, float eps) {
    const auto [batch, channels, plane] = sizes;
    const int64_t count = checked_count({{"batch", batch}, {"channels", channels}, {"plane", plane}});
    const auto& [alpha, gamma, beta] = parameters;
    NormArgs args{};
    args.batch = batch, args.channels = channels, args.plane = plane;
    args.in_dtype = checked_dtype(x.second), args.x = required("x", x.first, count, args.in_dtype);
    args.out_dtype = checked_dtype(y.second), args.y = required("y", y.first, count, args.out_dtype);
    args.alpha = checked_rows("alpha", alpha, batch, channels), args.alpha_row = alpha.second;
    args.gamma = checked_rows("gamma", gamma, batch, channels), args.gamma_row = gamma.second;
    args.beta = checked_rows("beta", beta, batch, channels), args.beta_row = beta.second;
    args.bias = optional<const float>("bias", bias, channels);
    args.channels_last = true, args.elu = elu, args.eps = eps;
    return args;
}

int64_t checked_tiles(int64_t channels, int64_t plane, Dtype dtype) {
    checked_count({{"channels", channels}, {"plane", plane}});
    if (std::max(channels, plane) > 0x7fffffffll) {
        throw std::invalid_argument("maps must have fewer than 2**31 pixels and channels; got " +
                                    std::to_string(plane) + " and " + std::to_string(channels));
    }
    return norm_tiles(channels, plane, dtype);
}

void norm_rows(const Typed& x, const Typed& y, const Sizes& sizes, const std::array<Parameter, 3>& parameters,
               const Array& bias, bool elu, float eps, int isa) {
    const NormArgs args = norm_args(x, y, sizes, parameters, bias, elu, eps);
    if (args.in_dtype == Dtype::kFloat16 || args.out_dtype == Dtype::kFloat16) {
        throw std::invalid_argument("the CPU kernel takes float32 and bfloat16; got float16");
    }
    instance_norm_plus_cpu(args, isa);
}

// Target is the stream handle on CUDA; in emulation, whether threads run in reverse order.
template <class Target, void (*run)(const NormArgs&, float*, bool, Target)>
void norm_blocks(const Typed& x, const Typed& y, const Sizes& sizes,
                 const std::array<Parameter, 3>& parameters, const Array& bias, bool elu, float eps,
                 const Array& partials, bool single, Target target) {
    const NormArgs args = norm_args(x, y, sizes, parameters, bias, elu, eps);
    const int64_t tiles = checked_tiles(args.channels, args.plane, args.in_dtype);
    const int64_t count = checked_count({{"batch", args.batch}, {"tiles", 2 * tiles}, {"channels", args.channels}});
    run(args, single ? nullptr : required<float>("partials", partials, count), single, target);
}

// Parameters are gamma, beta (channels,), add, scale and shift (batch, channels). Target as above.
template <class Target, void (*run)(const GroupNormArgs&, float*, float*, Target)>
void group_norm_blocks(const Typed& x, const Typed& y, const Sizes& sizes, int64_t groups,
                       const std::array<Array, 5>& parameters, int64_t code, float eps,
                       const Array& partials, const Array& coefficients, Target target) {
    const auto [batch, channels, plane] = sizes;
    const int64_t count = checked_count({{"batch", batch}, {"channels", channels}, {"plane", plane}});
    check_groups(groups, channels);
    const auto& [gamma, beta, add, scale, shift] = parameters;
    const int64_t rows = batch * channels;
    const Dtype in = checked_dtype(x.second), out = checked_dtype(y.second);
    const GroupNormArgs args{batch,
                             channels,
                             plane,
                             groups,
                             required("x", x.first, count, in),
                             required("y", y.first, count, out),
                             optional<const float>("gamma", gamma, channels),
                             optional<const float>("beta", beta, channels),
                             optional<const float>("add", add, rows),
                             optional<const float>("scale", scale, rows),
                             optional<const float>("shift", shift, rows),
                             true,
                             in,
                             out,
                             activation(code),
                             eps,
                             channels};
    const int64_t tiles = checked_tiles(channels, plane, in);
    const int64_t floats = checked_count({{"batch", batch}, {"tiles", 2 * tiles}, {"channels", channels}});
    run(args, required<float>("partials", partials, floats),
        required<float>("coefficients", coefficients, 3 * rows), target);
}

template <class Target, void (*run)(const UpdateArgs&, Target)>
void update_rows(const Array& x, const Array& h, const Sizes& sizes, const Strided& f, const Table& rows,
                 const Array& seeds, const Array& samples, const Array& noise_weights, const Array& mask,
                 const Array& known, const Strided& net_input, const Array& nonfinite, Target target) {
    const auto [batch, channels, plane] = sizes;
    UpdateArgs args =
        state_args(batch, channels, plane, x, h, samples, noise_weights, mask, known, nonfinite);
    args.f_layout = checked_layout("f", f, sizes), args.f = reinterpret_cast<const void*>(f.first.address);
    if (net_input.first.address != 0) {
        args.net_layout = checked_layout("net_input", net_input, sizes);
        args.net_input = reinterpret_cast<void*>(net_input.first.address);
    }
    const auto& [table, steps, counter, count] = rows;
    checked_count({{"rows", count}, {"columns", kRowWidth}});
    args.rows = {required<const float>("rows.table", table, count * kRowWidth),
                 required<const int64_t>("rows.steps", steps, 2 * count),
                 required<const int32_t>("rows.counter", counter, 1), count};
    args.seeds = required<const int64_t>("seeds", seeds, batch);
    if (count > 0) run(args, target);
}

constexpr const char* kNormDoc =
    "(x, y, (batch, channels, plane), (alpha, gamma, beta), bias, elu, eps, ...): x and y are (array, "
    "dtype), a parameter is (array, floats between rows).";
constexpr const char* kGroupDoc =
    "(x, y, (batch, channels, plane), groups, (gamma, beta, add, scale, shift), activation, eps, partials, "
    "coefficients, target): x and y are (array, dtype).";
constexpr const char* kUpdateDoc =
    "(x, h, (batch, channels, plane), f, rows, seeds, samples, noise_weights, mask, known, net_input, "
    "nonfinite, target): f and net_input are (array, (dtype, sample, channel, pixel, channels)).";

}  // namespace

void bind_native(py::module_& m) {
    m.def(
        "norm_tiles",
        [](int64_t channels, int64_t plane, int64_t dtype) {
            return checked_tiles(channels, plane, checked_dtype(dtype));
        },
        "(channels, plane, dtype): tiles of the partial statistics of a map on CUDA.");
    m.def(
        "convert_float16",
        [](const Array& values, const Array& halves, int64_t count, bool widen) {
            checked_count({{"count", count}});
            auto* value = required<float>("values", values, count);
            auto* half = required<Float16>("halves", halves, count);
            for (int64_t i = 0; i < count; ++i, ++value, ++half) {
                widen ? store(value, to_float(*half)) : store(half, *value);
            }
        },
        NoGil(), "(values, halves, count, widen): float32 from float16, or the other way; for tests.");
    m.def("instance_norm_plus_rows", &norm_rows, NoGil(), kNormDoc);
    m.def("emulated_instance_norm_plus", &norm_blocks<bool, emulated_instance_norm_plus>, NoGil(), kNormDoc);
    m.def("emulated_group_norm", &group_norm_blocks<bool, emulated_group_norm>, NoGil(), kGroupDoc);
    m.def("sampler_update_rows", &update_rows<int, sampler_update_cpu>, NoGil(), kUpdateDoc);
    m.def("emulated_sampler_update", &update_rows<bool, emulated_sampler_update>, NoGil(), kUpdateDoc);
#if defined(NCSN_FAST_CUDA)
    m.def("instance_norm_plus_cuda", &norm_blocks<Address, instance_norm_plus_cuda>, NoGil(), kNormDoc);
    m.def("group_norm_cuda", &group_norm_blocks<Address, group_norm_cuda>, NoGil(), kGroupDoc);
    m.def("sampler_update_rows_cuda", &update_rows<Address, sampler_update_cuda>, NoGil(), kUpdateDoc);
#endif
}

}  // namespace ncsn_fast
