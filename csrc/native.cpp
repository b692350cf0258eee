#include "native.h"

#include <pybind11/stl.h>

#include <array>

#include "cuda/kernels.h"
#include "steps.h"

namespace py = pybind11;

namespace ncsn_fast {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;
using Sizes = std::array<int64_t, 3>;      // batch, channels, plane
using Typed = std::array<int64_t, 2>;      // address, dtype
using Parameter = std::array<int64_t, 2>;  // address, floats from one sample's row to the next
using Strided = std::array<int64_t, 6>;    // address, dtype, strides of sample, channel, pixel; channels
using Table = std::array<int64_t, 4>;      // addresses of table, steps, counter; count of rows

template <class T>
T* pointer_of(int64_t address) {
    return pointer<T>(static_cast<Address>(address));
}

Dtype checked_dtype(int64_t code) {
    if (code >= 0 && code <= 2) return static_cast<Dtype>(code);
    throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16); got " +
                                std::to_string(code));
}

MapLayout layout_of(const Strided& map) {
    return {checked_dtype(map[1]), map[2], map[3], map[4], map[5]};
}

NormArgs norm_args(const Typed& x, const Typed& y, const Sizes& sizes,
                   const std::array<Parameter, 3>& parameters, Address bias, bool elu, float eps) {
    const auto [batch, channels, plane] = sizes;
    check_sizes(batch, channels, plane);
    const auto& [alpha, gamma, beta] = parameters;
    NormArgs args{};
    args.batch = batch, args.channels = channels, args.plane = plane;
    args.x = pointer_of<const void>(x[0]), args.in_dtype = checked_dtype(x[1]);
    args.y = pointer_of<void>(y[0]), args.out_dtype = checked_dtype(y[1]);
    args.alpha = pointer_of<const float>(alpha[0]), args.alpha_row = alpha[1];
    args.gamma = pointer_of<const float>(gamma[0]), args.gamma_row = gamma[1];
    args.beta = pointer_of<const float>(beta[0]), args.beta_row = beta[1];
    args.bias = pointer<const float>(bias), args.channels_last = true, args.elu = elu, args.eps = eps;
    return args;
}

void norm_rows(const Typed& x, const Typed& y, const Sizes& sizes, const std::array<Parameter, 3>& parameters,
               Address bias, bool elu, float eps, int isa) {
    const NormArgs args = norm_args(x, y, sizes, parameters, bias, elu, eps);
    if (args.in_dtype == Dtype::kFloat16 || args.out_dtype == Dtype::kFloat16) {
        throw std::invalid_argument("the CPU kernel takes float32 and bfloat16; got float16");
    }
    instance_norm_plus_cpu(args, isa);
}

// Target is the stream handle on CUDA; in emulation, whether threads run in reverse order.
template <class Target, void (*run)(const NormArgs&, float*, bool, Target)>
void norm_blocks(const Typed& x, const Typed& y, const Sizes& sizes,
                 const std::array<Parameter, 3>& parameters, Address bias, bool elu, float eps,
                 Address partials, bool single, Target target) {
    run(norm_args(x, y, sizes, parameters, bias, elu, eps), pointer<float>(partials), single, target);
}

template <class Target, void (*run)(const UpdateArgs&, Target)>
void update_rows(Address x, Address h, const Sizes& sizes, const Strided& f, const Table& rows, Address seeds,
                 Address samples, Address noise_weights, Address mask, Address known, const Strided& net_input,
                 float scale, float shift, Address nonfinite, Target target) {
    const auto [batch, channels, plane] = sizes;
    check_sizes(batch, channels, plane);
    UpdateArgs args{};
    args.batch = batch, args.channels = channels, args.plane = plane;
    args.x = pointer<float>(x), args.h = pointer<float>(h);
    args.f = pointer_of<const void>(f[0]), args.f_layout = layout_of(f);
    args.rows = {pointer_of<const float>(rows[0]), pointer_of<const int64_t>(rows[1]),
                 pointer_of<const int32_t>(rows[2]), rows[3]};
    args.seeds = pointer<const int64_t>(seeds), args.samples = pointer<const int64_t>(samples);
    args.noise_weights = pointer<const float>(noise_weights);
    args.mask = pointer<const uint8_t>(mask), args.known = pointer<const float>(known);
    args.net_input = pointer_of<void>(net_input[0]), args.net_layout = layout_of(net_input);
    args.scale = scale, args.shift = shift, args.nonfinite = pointer<int32_t>(nonfinite);
    if (args.rows.count > 0) run(args, target);
}

constexpr const char* kNormDoc =
    "(x, y, (batch, channels, plane), (alpha, gamma, beta), bias, elu, eps, ...): x and y are (address, "
    "dtype), a parameter is (address, floats between rows).";
constexpr const char* kUpdateDoc =
    "(x, h, (batch, channels, plane), f, rows, seeds, samples, noise_weights, mask, known, net_input, scale, "
    "shift, nonfinite, target): f and net_input are (address, dtype, sample, channel, pixel, channels).";

}  // namespace

void bind_native(py::module_& m) {
    m.def(
        "norm_tiles",
        [](int64_t channels, int64_t plane, int64_t dtype) {
            check_sizes(1, channels, plane);
            return norm_tiles(channels, plane, checked_dtype(dtype));
        },
        "(channels, plane, dtype): tiles of the partial statistics of a map on CUDA.");
    m.def(
        "convert_float16",
        [](Address values, Address halves, int64_t count, bool widen) {
            for (int64_t i = 0; i < count; ++i) {
                float& value = pointer<float>(values)[i];
                Float16& half = pointer<Float16>(halves)[i];
                widen ? store(&value, to_float(half)) : store(&half, value);
            }
        },
        NoGil(), "(values, halves, count, widen): float32 from float16, or the other way; for tests.");
    m.def("instance_norm_plus_rows", &norm_rows, NoGil(), kNormDoc);
    m.def("emulated_instance_norm_plus", &norm_blocks<bool, emulated_instance_norm_plus>, NoGil(), kNormDoc);
    m.def("sampler_update_rows", &update_rows<int, sampler_update_cpu>, NoGil(), kUpdateDoc);
    m.def("emulated_sampler_update", &update_rows<bool, emulated_sampler_update>, NoGil(), kUpdateDoc);
#if defined(NCSN_FAST_CUDA)
    m.def("instance_norm_plus_cuda", &norm_blocks<Address, instance_norm_plus_cuda>, NoGil(), kNormDoc);
    m.def("sampler_update_rows_cuda", &update_rows<Address, sampler_update_cuda>, NoGil(), kUpdateDoc);
#endif
}

}  // namespace ncsn_fast
