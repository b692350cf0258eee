// ncsn_fast._C: bindings of the kernels, which take arrays and sizes. Does not depend on torch, so one
// build works with every torch version. Python checks shapes, dtypes and devices before each call; here
// the memory of every array is checked against the sizes (array.h). Kernels release the GIL.
#include <omp.h>

#include <array>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "array_caster.h"
#include "gradients.h"
#include "native.h"
#include "steps.h"
#if defined(NCSN_FAST_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace ncsn_fast {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

template <NoiseKind kind>
void bind_noise(py::module_& m, const char* name, const char* doc) {
    m.def(
        name,
        [](const Array& out, const Array& samples, int64_t batch, int64_t numel, int64_t seed, int64_t stream,
           int64_t step, int isa) {
            const int64_t count = checked_count({{"batch", batch}, {"numel", numel}});
            check_elements(numel);
            const int64_t written = kind == NoiseKind::kWords ? batch * ((numel + 3) / 4 * 4) : count;
            const NoiseArgs args{batch,
                                 numel,
                                 required<const int64_t>("samples", samples, batch),
                                 checked_uint32("seed", seed),
                                 checked_uint32("stream", stream),
                                 checked_uint32("step", step),
                                 required<float>("out", out, written)};
            fill_noise(kind, args, isa);
        },
        py::arg("out"), py::arg("samples"), py::arg("batch"), py::arg("numel"), py::arg("seed"),
        py::arg("stream"), py::arg("step"), py::arg("isa") = -1, NoGil(), doc);
}

// Binds a kernel under one name twice: as a function that runs it (last argument `isa`), and as a
// method of Plan that appends it as a step.
template <class... A>
void bind_kernel(py::module_& m, py::class_<Plan>& plan, const char* name, Step (*make)(A...),
                 const char* doc) {
    m.def(name, [make](A... arguments, int isa) { make(arguments...)(isa); }, NoGil(), doc);
    plan.def(name, [make](Plan& self, A... arguments) { self.add(make(arguments...)); });
}

// Arguments of an update, in the order of its Python call. `target` is the instruction-set level on
// the CPU and the stream handle on CUDA.
template <class Target, void (*run)(const UpdateArgs&, Target)>
void update(const Array& x, const Array& f, const Array& h, int64_t batch, int64_t channels, int64_t plane,
            bool f_bfloat16, bool f_channels_last, const std::array<double, 11>& row, int64_t seed,
            const Array& samples, int64_t step, const Array& noise_weights, const Array& mask,
            const Array& known, int64_t ref_step, const Array& net_input, bool net_bfloat16,
            bool net_channels_last, const Array& nonfinite, Target target) {
    UpdateArgs args = update_args(x, f, h, batch, channels, plane, f_bfloat16, f_channels_last, seed,
                                  samples, noise_weights, mask, known, net_input, net_bfloat16,
                                  net_channels_last, nonfinite);
    args.row = update_row(row.data(), step, ref_step);
    run(args, target);
}

// Capsules hold owned references to tensors; torch itself checks that their shapes fit.
void add_convolution(Plan& plan, const std::string& name, const py::capsule& destination,
                     const py::capsule& x, const py::capsule& weight, const std::optional<py::capsule>& bias,
                     const std::array<int64_t, 2>& padding, const std::array<int64_t, 2>& stride,
                     const std::array<int64_t, 2>& dilation, int64_t groups, const Array& memory,
                     int64_t zero) {
    checked_count({{"zero", zero}});
    plan.add(Convolution{name, destination.get_pointer(), x.get_pointer(), weight.get_pointer(),
                         bias ? bias->get_pointer() : nullptr, padding, stride, dilation, groups,
                         required<uint8_t>("memory", memory, zero), zero});
}

// The matrix product of tensors that Python made; torch itself checks that their shapes fit.
void add_product(Plan& plan, const std::string& name, const py::capsule& out,
                 const std::optional<py::capsule>& added, const py::capsule& a, const py::capsule& b) {
    plan.add(Product{name, out.get_pointer(), added ? added->get_pointer() : nullptr, a.get_pointer(),
                     b.get_pointer()});
}

// A step that calls Python, for what has no kernel here. The plan takes a reference, which may be
// dropped by a thread that does not hold the GIL.
void add_callback(Plan& plan, py::function function) {
    const auto release = [](py::function* held) {
        const py::gil_scoped_acquire acquire;
        delete held;
    };
    const std::shared_ptr<py::function> held(new py::function(std::move(function)), release);
    plan.add([held](int) {
        const py::gil_scoped_acquire acquire;
        (*held)();
    });
}

// Rows of a level: coefficients (rows, 11) float64 are the numbers of a Row; steps (rows, 2) int64 are
// the noise step and the reference's.
void sample(Plan& plan, const Array& x, const Array& f, const Array& h, const Map& nhwc, bool bfloat16,
            int64_t seed, const Array& samples, const Array& noise_weights, const Array& mask,
            const Array& known, const Array& net_input, const Array& coefficients, const Array& steps,
            int64_t rows, int isa) {
    const auto [batch, height, width, channels] = nhwc;
    required("net_input", net_input, checked_map(nhwc), dtype(bfloat16));  // the network reads it
    checked_count({{"rows", rows}, {"columns", 11}});
    const auto* k = required<const double>("coefficients", coefficients, 11 * rows);
    const auto* step = required<const int64_t>("steps", steps, 2 * rows);
    const UpdateArgs args =
        update_args(x, f, h, batch, channels, height * width, bfloat16, true, seed, samples,
                    noise_weights, mask, known, net_input, bfloat16, true, Array{});
    std::vector<Row> table;
    for (int64_t r = 0; r < rows; ++r, k += 11, step += 2) {
        table.push_back(update_row(k, step[0], step[1]));
    }
    plan.sample(args, table, isa, [] {  // checks for Ctrl-C after each row
        const py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    });
}

void bind_plan(py::class_<Plan>& plan) {
    plan.def(py::init([](Address convolution_add, Address product_add, Address products, Address release) {
                 if (convolution_add == 0 || product_add == 0 || products == 0 || release == 0) {
                     throw std::invalid_argument("a plan needs four functions of libtorch; got an address of 0");
                 }
                 return std::make_unique<Plan>(Torch{reinterpret_cast<Torch::ConvolutionAdd>(convolution_add),
                                                     reinterpret_cast<Torch::ProductAdd>(product_add),
                                                     reinterpret_cast<Torch::Products>(products),
                                                     reinterpret_cast<Torch::Release>(release)});
             }),
             "(convolution_add, product_add, products, release): addresses of libtorch's functions.");
    plan.def("convolution", &add_convolution,
             "(name, destination, x, weight, bias, padding, stride, dilation, groups, memory, zero): tensors are "
             "capsules whose references the plan takes, bias may be None; `zero` bytes of `memory` are "
             "cleared first.");
    plan.def("product", &add_product,
             "(name, out, added, a, b): out = added + a b of matrices, or, where added is None, the products of "
             "two batches of them; tensors as of `convolution`.");
    plan.def(
        "level_parameters",
        [](Plan& self, const Array& table, int64_t levels, int64_t batch, int64_t channels, const Array& alpha,
           const Array& gamma, const Array& beta) {
            const int64_t size = checked_count({{"levels", levels}, {"channels", channels}});
            const int64_t rows = checked_count({{"batch", batch}, {"channels", channels}});
            self.add(LevelParameters{required<const float>("table", table, 3 * size), levels, batch, channels,
                                     required<float>("alpha", alpha, rows),
                                     required<float>("gamma", gamma, rows),
                                     required<float>("beta", beta, rows)});
        },
        "(table, levels, batch, channels, alpha, gamma, beta)");
    plan.def(
        "set_levels",
        [](Plan& self, const Array& levels, int64_t batch) {
            checked_count({{"batch", batch}});
            self.set_levels(required<const int64_t>("levels", levels, batch), batch);
        },
        "(levels, batch): reads the parameters of every norm for each sample's level.");
    plan.def("callback", &add_callback, "(function): a step that calls a function without arguments.");
    plan.def("run", &Plan::run, NoGil(), "(isa): runs every step once.");
    plan.def(
        "profile",
        [](Plan& self, int isa) {
            std::vector<double> seconds(self.size());
            self.profile(isa, seconds.data());
            return seconds;
        },
        NoGil(), "(isa): as run; returns the seconds of each step.");
    plan.def("sample", &sample, NoGil(),
             "(x, f, h, nhwc, bfloat16, seed, samples, noise_weights, mask, known, net_input, "
             "coefficients, steps, rows, isa): runs the network and the update for each row.");
    plan.def("__len__", &Plan::size);
}

void pack_winograd(const Array& weight, const Array& values, const Array& scales, int64_t in_channels,
                   int64_t out_channels, bool bfloat16) {
    const WinogradSizes sizes = winograd_sizes(in_channels, out_channels);
    check_scales(scales, bfloat16);
    winograd_pack(required<const float>("weight", weight, 9 * in_channels * out_channels), in_channels,
                  out_channels, dtype(bfloat16), required("values", values, sizes.values, dtype(bfloat16)),
                  optional<float>("scales", scales, sizes.scales));
}

void bind_winograd_pack(py::module_& m) {
    m.def(
        "winograd_sizes",
        [](int64_t in_channels, int64_t out_channels) {
            const WinogradSizes sizes = winograd_sizes(in_channels, out_channels);
            return std::array<int64_t, 2>{sizes.values, sizes.scales};
        },
        "(in_channels, out_channels): elements of packed values, and of scales.");
    m.def("winograd_pack", &pack_winograd, NoGil(),
          "(weight, values, scales, in_channels, out_channels, bfloat16): values are int16 with scales for "
          "bfloat16 maps, else float32.");
}

// One product of tiles; rows of the three are `strides` words of 4 bytes apart.
void multiply_tiles(const Array& sum, const Array& a, const Array& b, const std::array<int64_t, 3>& strides,
                    int isa) {
    const auto words = [](int64_t stride) {
        checked_count({{"stride", stride}});
        return 15 * stride + 16;
    };
    constexpr int64_t kWord = 4;
    tile_product_cpu({required<float>("sum", sum, words(strides[0])),
                      required<const uint32_t>("a", a, words(strides[1])),
                      required<const uint32_t>("b", b, words(strides[2])), kWord * strides[0],
                      kWord * strides[1], kWord * strides[2]},
                     isa);
}

void bind_tiles(py::module_& m) {
    m.def(
        "amx_state",
        [] {
            const AmxState& state = amx_state();
            return std::tuple(state.compiled, state.processor, state.enabled, state.refusal);
        },
        "Whether there are kernels for AMX, the processor has it, the system has enabled it, and the error "
        "number with which it refused this process its use.");
    m.def("tile_product", &multiply_tiles, NoGil(),
          "(sum, a, b, strides, isa): sum += a b as the instruction TDPBF16PS computes it; for tests.");
    m.def(
        "tile_conv_values",
        [](int64_t in_channels, int64_t out_channels, int64_t taps) {
            return tile_conv_sizes(in_channels, out_channels, taps).values;
        },
        "(in_channels, out_channels, taps): elements of packed weights.");
    m.def(
        "padded_map",
        [](const Map& nhwc, int64_t border) {
            const PaddedMap map = checked_padded(nhwc, border);
            const PixelLayout& pixels = map.pixels;
            return std::array<int64_t, 5>{map.elements, map.first, pixels.image, pixels.row, pixels.pixel};
        },
        "((batch, height, width, channels), border): elements of a map with so many zeros around every image; "
        "the first pixel's element, and the elements from an image, a row and a pixel to the next.");
    m.def(
        "strips",
        [](int64_t height, int64_t width) {
            checked_count({{"height", height}, {"width", width}});
            const Strips strips(height, width);
            return std::array<int64_t, 2>{strips.rows, strips.count};
        },
        "(height, width): rows of a strip of an image, and strips.");
    m.def(
        "tile_pack",
        [](const Array& weight, const Array& values, int64_t in_channels, int64_t out_channels, int64_t taps) {
            const TileConvSizes sizes = tile_conv_sizes(in_channels, out_channels, taps);
            tile_pack(required<const float>("weight", weight, taps * taps * in_channels * out_channels),
                      in_channels, out_channels, taps, required<Bfloat16>("values", values, sizes.values));
        },
        NoGil(), "(weight, values, in_channels, out_channels, taps): values are bfloat16.");
}

std::vector<std::string> isa_levels(bool usable) {
    std::vector<std::string> names;
    for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx2Vnni, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAmx}) {
        if (usable ? isa_supported(isa) : isa_compiled(isa)) names.emplace_back(isa_name(isa));
    }
    return names;
}

py::dict build_info() {
    py::dict info;
    info["version"] = NCSN_FAST_VERSION;
    info["compiler"] = NCSN_FAST_COMPILER;
    info["isa_levels"] = isa_levels(false);
    info["sanitizers"] = NCSN_FAST_SANITIZE;
#if defined(NCSN_FAST_CUDA)
    info["cuda_built"] = true;
    info["cuda_version"] = NCSN_FAST_CUDA_VERSION;
    info["cuda_architectures"] = NCSN_FAST_CUDA_ARCHITECTURES;
#else
    info["cuda_built"] = false;
    info["cuda_version"] = "";
    info["cuda_architectures"] = "";
#endif
    return info;
}

// OpenMP ends the process if it cannot start as many.
void set_num_threads(int64_t threads) {
    if (threads < 1 || threads > 4096) {
        throw std::invalid_argument("threads must be in [1, 4096]; got " + std::to_string(threads));
    }
    omp_set_num_threads(static_cast<int>(threads));
}

int device_count() {
#if defined(NCSN_FAST_CUDA)
    return cuda_device_count();
#else
    return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of ncsn_fast on arrays and sizes; use ncsn_fast.ops. An array is (address, bytes), or (address, "
              "bytes, row): a map whose pixels begin `row` elements apart, where a kernel writes one so.";
    m.def("build_info", &build_info, "How this extension was built.");
    m.def("isa_levels", [] { return isa_levels(true); }, "CPU levels that this machine can run.");
    m.def("default_isa", [] { return isa_name(resolve_isa(-1)); }, "The CPU level in use.");
    m.def("set_num_threads", &set_num_threads, py::arg("threads"),
          "Sets the OpenMP threads of the calling thread, which its kernels and torch's use.");
    m.def("cuda_device_count", &device_count, "CUDA devices; 0 without a driver or without CUDA.");
    bind_noise<NoiseKind::kWords>(m, "philox_words", "uint32 (batch, ceil(numel / 4), 4).");
    bind_noise<NoiseKind::kUniform>(m, "uniform", "float32 (batch, numel) in [0, 1).");
    bind_noise<NoiseKind::kNormal>(m, "normal", "float32 (batch, numel), standard normal.");
    m.def(
        "box_muller",
        [](const Array& out, const Array& words, int64_t pairs, int isa) {
            const int64_t count = checked_count({{"pairs", pairs}, {"two", 2}});
            box_muller_cpu(required<const uint32_t>("words", words, count), pairs,
                           required<float>("out", out, count), isa);
        },
        py::arg("out"), py::arg("words"), py::arg("pairs"), py::arg("isa") = -1,
        "Two normals for each pair of the given uint32 words.");
    m.def("sampler_update", &update<int, sampler_update_cpu>, NoGil(),
          "(x, f, h, batch, channels, plane, f_bfloat16, f_channels_last, row, seed, samples, step, "
          "noise_weights, mask, known, ref_step, net_input, net_bfloat16, net_channels_last, nonfinite, "
          "isa); (0, 0) is no tensor.");
    py::class_<Plan> plan(m, "Plan", "A network as steps on planned buffers; see ncsn_fast.engines.cpu.engine.");
    bind_plan(plan);
    bind_kernel(m, plan, "instance_norm_plus", &norm_step,
                "(x, y, alpha, gamma, beta, batch, channels, plane, channels_last, per_sample, in_bfloat16, "
                "out_bfloat16, elu, eps, strip_sums, width, border, isa); isa -1 is the best level; strip_sums "
                "(0, 0) where there are none, border -1 of a dense y; with either, rows have `width` pixels.");
    bind_kernel(m, plan, "zero_around", &zero_around_step,
                "(y, (batch, height, width, channels), border, isa): the zeros of a map that has some around it.");
    bind_kernel(m, plan, "add_elu", &add_elu_step,
                "(a, b, sum, y, count, bfloat16, isa); b, sum or y (0, 0) where there is none.");
    bind_kernel(m, plan, "add_activation", &add_activation_step,
                "(a, b, sum, y, pixels, channels, bfloat16, activation, a_weight, b_weight, (batch, height, width, "
                "channels), border, isa); b, sum or y (0, 0) where there is none; sum and y may have a row; border -1 "
                "of a y without one.");
    bind_kernel(m, plan, "group_norm", &group_norm_step,
                "(x, y, gamma, beta, add, scale, shift, batch, channels, plane, groups, channels_last, "
                "in_bfloat16, out_bfloat16, activation, eps, strip_sums, width, border, isa); gamma and beta "
                "(channels,), the next three (batch, channels), each (0, 0) where there is none; y may have a row; "
                "the last as of instance_norm_plus.");
    bind_kernel(m, plan, "scale_shift", &scale_shift_step,
                "(x, y, scale, shift, batch, channels, plane, channels_last, in_bfloat16, out_bfloat16, "
                "activation, isa); scale and shift (batch, channels), each (0, 0) where there is none.");
    bind_kernel(m, plan, "copy_channels", &copy_channels_step,
                "(x, y, pixels, channels, x_channels, x_first, y_channels, y_first, in_bfloat16, out_bfloat16, "
                "isa)");
    bind_kernel(m, plan, "upsample_nearest", &upsample_nearest_step,
                "(x, y, (batch, height, width, channels), rows, columns, bfloat16, isa); y may have a row.");
    bind_kernel(m, plan, "depth_to_space", &depth_to_space_step,
                "(z, y, (batch, height, width, channels), out_height, out_width, factor, first, bfloat16, isa); "
                "channels are those of y, which may have a row.");
    bind_kernel(m, plan, "softmax", &softmax_step,
                "(x, rows, columns, scale, bfloat16, isa): softmax of scale * x, in place.");
    bind_kernel(m, plan, "depthwise_transposed", &depthwise_transposed_step,
                "(x, weight, bias, y, (batch, height, width, channels), out_height, out_width, taps, stride, "
                "padding, bfloat16, isa); weight (taps, taps, channels), bias (0, 0) where there is none.");
    bind_kernel(m, plan, "attention", &attention_step,
                "(q, k, v, out, (batch, heads, queries, keys, width, value_width), q layout, k layout, v "
                "layout, out layout, scale, bfloat16, isa); a layout is the elements between two tokens, and "
                "between two heads.");
    bind_kernel(m, plan, "max_pool5", &pool5_step<PoolKind::kMax>,
                "(x, y, (batch, height, width, channels), bfloat16, border, isa); border -1 of a dense y.");
    bind_kernel(m, plan, "avg_pool5", &pool5_step<PoolKind::kAverage>,
                "(x, y, (batch, height, width, channels), bfloat16, border, isa); border -1 of a dense y.");
    bind_kernel(m, plan, "mean_pool2", &mean_pool2_step,
                "(a, b, y, (batch, height, width, channels), bfloat16, isa); b (0, 0) where there is none.");
    bind_kernel(m, plan, "resize_add", &resize_add_step,
                "(x, a, y, (batch, height, width, channels), out_height, out_width, bfloat16, isa); a (0, 0) "
                "where there is none.");
    bind_kernel(m, plan, "winograd_conv", &winograd_step,
                "(x, values, scales, bias, added, out, (batch, height, width, channels), out_channels, dilation, "
                "bfloat16, isa); bias or added (0, 0) where there is none; out may have a row.");
    bind_kernel(m, plan, "tile_conv", &tile_conv_step,
                "(x, values, bias, added, sum, y, strip_sums, (batch, height, width, channels), out_channels, taps, "
                "dilation, activation, border, y_border, isa): bfloat16 maps; bias, added, sum, y or strip_sums "
                "(0, 0) where there is none; sum and y may have a row; borders of x and y are -1 of maps without one.");
    bind_winograd_pack(m);
    bind_tiles(m);
    bind_gradients(m);
    bind_native(m);
#if defined(NCSN_FAST_CUDA)
    m.def("sampler_update_cuda", &update<Address, sampler_update_cuda>, NoGil(),
          "As sampler_update, with a stream in place of isa.");
#endif
}

}  // namespace ncsn_fast
