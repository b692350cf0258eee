// ncsn_fast._C: the kernels on addresses and sizes. No torch here, so one build serves every torch;
// ncsn_fast/ops.py checks shapes, types and devices before it calls. The GIL is released in kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#if defined(NCSN_FAST_CUDA)
#include "cuda/sampler_update.h"
#endif

namespace py = pybind11;

namespace ncsn_fast {
namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

uint32_t checked_uint32(const char* name, int64_t value) {
    if (value >= 0 && value <= 0xffffffffll) return static_cast<uint32_t>(value);
    throw std::invalid_argument(std::string(name) + " must be in [0, 2**32); got " + std::to_string(value) +
                                ". The noise contract has 32 bits for it.");
}

void check_sizes(int64_t batch, int64_t channels, int64_t plane) {
    if (batch >= 0 && channels >= 0 && plane >= 0) return;
    throw std::invalid_argument("sizes must not be negative; got batch " + std::to_string(batch) +
                                ", channels " + std::to_string(channels) + ", plane " +
                                std::to_string(plane));
}

void check_map(int64_t batch, int64_t height, int64_t width, int64_t channels) {
    check_sizes(batch, channels, std::min(height, width));
}

Dtype dtype(bool bfloat16) { return bfloat16 ? Dtype::kBfloat16 : Dtype::kFloat32; }

template <NoiseKind kind>
void bind_noise(py::module_& m, const char* name, const char* doc) {
    m.def(
        name,
        [](Address out, Address samples, int64_t batch, int64_t numel, int64_t seed, int64_t stream,
           int64_t step, int isa) {
            const NoiseArgs args{batch,
                                 numel,
                                 pointer<const int64_t>(samples),
                                 checked_uint32("seed", seed),
                                 checked_uint32("stream", stream),
                                 checked_uint32("step", step),
                                 pointer<void>(out)};
            check_sizes(batch, 1, numel);
            fill_noise(kind, args, isa);
        },
        py::arg("out"), py::arg("samples"), py::arg("batch"), py::arg("numel"), py::arg("seed"),
        py::arg("stream"), py::arg("step"), py::arg("isa") = -1, py::call_guard<py::gil_scoped_release>(),
        doc);
}

void norm(Address x, Address y, Address alpha, Address gamma, Address beta, int64_t batch,
          int64_t channels, int64_t plane, bool channels_last, bool per_sample, bool in_bfloat16,
          bool out_bfloat16, bool elu, float eps, int isa) {
    check_sizes(batch, channels, plane);
    const NormArgs args{batch,
                        channels,
                        plane,
                        pointer<const void>(x),
                        pointer<void>(y),
                        pointer<const float>(alpha),
                        pointer<const float>(gamma),
                        pointer<const float>(beta),
                        per_sample,
                        channels_last,
                        dtype(in_bfloat16),
                        dtype(out_bfloat16),
                        elu,
                        eps};
    instance_norm_plus_cpu(args, isa);
}

void add_elu(Address a, Address b, Address sum, Address y, int64_t count, bool bfloat16, int isa) {
    check_sizes(1, 1, count);
    const AddEluArgs args{count,
                          pointer<const void>(a),
                          pointer<const void>(b),
                          pointer<void>(sum),
                          pointer<void>(y),
                          dtype(bfloat16)};
    add_elu_cpu(args, isa);
}

template <PoolKind kind>
void pool5(Address x, Address y, const std::array<int64_t, 4>& nhwc, bool bfloat16, int isa) {
    const auto [batch, height, width, channels] = nhwc;
    check_map(batch, height, width, channels);
    const PoolArgs args{
        batch, height, width, channels, pointer<const void>(x), pointer<void>(y), dtype(bfloat16)};
    pool5_cpu(kind, args, isa);
}

void mean_pool2(Address a, Address b, Address y, const std::array<int64_t, 4>& nhwc, bool bfloat16,
                int isa) {
    const auto [batch, height, width, channels] = nhwc;
    check_map(batch, height, width, channels);
    const MeanPoolArgs args{batch,
                            height,
                            width,
                            channels,
                            pointer<const void>(a),
                            pointer<const void>(b),
                            pointer<void>(y),
                            dtype(bfloat16)};
    mean_pool2_cpu(args, isa);
}

void resize_add(Address x, Address a, Address y, const std::array<int64_t, 4>& nhwc, int64_t out_height,
                int64_t out_width, bool bfloat16, int isa) {
    const auto [batch, height, width, channels] = nhwc;
    check_map(batch, height, width, channels);
    check_sizes(batch, out_height, out_width);
    const ResizeArgs args{batch,
                          channels,
                          height,
                          width,
                          out_height,
                          out_width,
                          pointer<const void>(x),
                          pointer<const void>(a),
                          pointer<void>(y),
                          dtype(bfloat16)};
    resize_add_cpu(args, isa);
}

void pack_winograd(Address weight, Address values, Address scales, int64_t in_channels,
                   int64_t out_channels) {
    check_sizes(1, std::min(in_channels, out_channels), 1);
    winograd_pack(pointer<const float>(weight), in_channels, out_channels, dtype(scales != 0),
                  pointer<void>(values), pointer<float>(scales));
}

void winograd_conv(Address x, Address values, Address scales, Address bias, Address out,
                   const std::array<int64_t, 4>& nhwc, int64_t out_channels, int64_t dilation,
                   bool accumulate, bool bfloat16, int isa) {
    const auto [batch, height, width, channels] = nhwc;
    check_map(batch, height, width, std::min(channels, out_channels));
    if (dilation < 1) {
        throw std::invalid_argument("dilation must be at least 1; got " + std::to_string(dilation));
    }
    const WinogradArgs args{batch,
                            height,
                            width,
                            channels,
                            out_channels,
                            dilation,
                            pointer<const void>(x),
                            pointer<const void>(values),
                            pointer<const float>(scales),
                            pointer<const float>(bias),
                            pointer<void>(out),
                            accumulate,
                            dtype(bfloat16)};
    winograd_conv_cpu(args, isa);
}

// Arguments of an update, in the order of its Python call. `target` is the instruction-set level on
// the CPU and the stream handle on CUDA.
template <class Target, void (*run)(const UpdateArgs&, Target)>
void update(Address x, Address f, Address h, int64_t batch, int64_t channels, int64_t plane,
            bool f_bfloat16, bool f_channels_last, const std::array<double, 6>& k, int64_t seed,
            Address samples, int64_t step, Address noise_weights, Address mask, Address known,
            double c_ref, int64_t ref_step, Address net_input, bool net_bfloat16,
            bool net_channels_last, float scale, float shift, Address nonfinite, Target target) {
    check_sizes(batch, channels, plane);
    const auto as_float = [](double v) { return static_cast<float>(v); };
    UpdateArgs args{};
    args.batch = batch, args.channels = channels, args.plane = plane;
    args.x = pointer<float>(x), args.h = pointer<float>(h), args.f = pointer<const void>(f);
    args.f_dtype = dtype(f_bfloat16), args.f_channels_last = f_channels_last;
    args.seed = checked_uint32("seed", seed), args.samples = pointer<const int64_t>(samples);
    args.noise_weights = pointer<const float>(noise_weights);
    args.mask = pointer<const uint8_t>(mask), args.known = pointer<const float>(known);
    args.row = {as_float(k[0]), as_float(k[1]), as_float(k[2]), as_float(k[3]), as_float(k[4]),
                as_float(k[5]), as_float(c_ref), checked_uint32("step", step),
                checked_uint32("ref_step", ref_step)};
    args.net_input = pointer<void>(net_input), args.net_dtype = dtype(net_bfloat16);
    args.net_channels_last = net_channels_last, args.scale = scale, args.shift = shift;
    args.nonfinite = pointer<int32_t>(nonfinite);
    run(args, target);
}

std::vector<std::string> isa_levels(bool usable) {
    std::vector<std::string> names;
    for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
        if (usable ? isa_supported(isa) : isa_compiled(isa)) names.emplace_back(isa_name(isa));
    }
    return names;
}

py::dict build_info() {
    py::dict info;
    info["version"] = NCSN_FAST_VERSION;
    info["compiler"] = NCSN_FAST_COMPILER;
    info["isa_levels"] = isa_levels(false);
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

int device_count() {
#if defined(NCSN_FAST_CUDA)
    return cuda_device_count();
#else
    return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of ncsn_fast on addresses and sizes; use ncsn_fast.ops.";
    m.def("build_info", &build_info, "How this extension was built.");
    m.def("isa_levels", [] { return isa_levels(true); }, "CPU levels that this machine can run.");
    m.def("default_isa", [] { return isa_name(resolve_isa(-1)); }, "The CPU level in use.");
    m.def("cuda_device_count", &device_count, "CUDA devices; 0 without a driver or without CUDA.");
    bind_noise<NoiseKind::kWords>(m, "philox_words", "uint32 (batch, ceil(numel / 4), 4).");
    bind_noise<NoiseKind::kUniform>(m, "uniform", "float32 (batch, numel) in [0, 1).");
    bind_noise<NoiseKind::kNormal>(m, "normal", "float32 (batch, numel), standard normal.");
    m.def(
        "box_muller",
        [](Address out, Address words, int64_t pairs, int isa) {
            box_muller_cpu(pointer<const uint32_t>(words), pairs, pointer<float>(out), isa);
        },
        py::arg("out"), py::arg("words"), py::arg("pairs"), py::arg("isa") = -1,
        "Two normals for each pair of the given uint32 words.");
    m.def("instance_norm_plus", &norm, py::call_guard<py::gil_scoped_release>(),
          "(x, y, alpha, gamma, beta, batch, channels, plane, channels_last, per_sample, in_bfloat16, "
          "out_bfloat16, elu, eps, isa); isa -1 is the best level.");
    m.def("sampler_update", &update<int, sampler_update_cpu>, py::call_guard<py::gil_scoped_release>(),
          "(x, f, h, batch, channels, plane, f_bfloat16, f_channels_last, coefficients, seed, samples, "
          "step, noise_weights, mask, known, c_ref, ref_step, net_input, net_bfloat16, "
          "net_channels_last, scale, shift, nonfinite, isa); 0 is no tensor.");
    m.def("add_elu", &add_elu, py::call_guard<py::gil_scoped_release>(),
          "(a, b, sum, y, count, bfloat16, isa); b, sum or y 0 where there is none.");
    m.def("max_pool5", &pool5<PoolKind::kMax>, py::call_guard<py::gil_scoped_release>(),
          "(x, y, (batch, height, width, channels), bfloat16, isa)");
    m.def("avg_pool5", &pool5<PoolKind::kAverage>, py::call_guard<py::gil_scoped_release>(),
          "(x, y, (batch, height, width, channels), bfloat16, isa)");
    m.def("mean_pool2", &mean_pool2, py::call_guard<py::gil_scoped_release>(),
          "(a, b, y, (batch, height, width, channels), bfloat16, isa); b 0 where there is none.");
    m.def("resize_add", &resize_add, py::call_guard<py::gil_scoped_release>(),
          "(x, a, y, (batch, height, width, channels), out_height, out_width, bfloat16, isa); a 0 where "
          "there is none.");
    m.def(
        "winograd_sizes",
        [](int64_t in_channels, int64_t out_channels) {
            const WinogradSizes sizes(in_channels, out_channels);
            return std::array<int64_t, 2>{sizes.values, sizes.scales};
        },
        "(in_channels, out_channels): elements of packed values, and of scales.");
    m.def("winograd_pack", &pack_winograd, py::call_guard<py::gil_scoped_release>(),
          "(weight, values, scales, in_channels, out_channels); scales 0: values are float32, not int16.");
    m.def("winograd_conv", &winograd_conv, py::call_guard<py::gil_scoped_release>(),
          "(x, values, scales, bias, out, (batch, height, width, in_channels), out_channels, dilation, "
          "accumulate, bfloat16, isa); bias 0 where there is none.");
#if defined(NCSN_FAST_CUDA)
    m.def("sampler_update_cuda", &update<Address, sampler_update_cuda>,
          py::call_guard<py::gil_scoped_release>(), "As sampler_update, with a stream in place of isa.");
#endif
}

}  // namespace ncsn_fast
