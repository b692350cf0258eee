// Conversion of Python arguments (arrays and sizes) to steps of a plan. Throws std::invalid_argument for
// arguments that do not fit together.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "array.h"
#include "cpu/plan.h"

namespace ncsn_fast {

using Map = std::array<int64_t, 4>;  // batch, height, width, channels

inline uint32_t checked_uint32(const char* name, int64_t value) {
    if (value >= 0 && value <= 0xffffffffll) return static_cast<uint32_t>(value);
    throw std::invalid_argument(std::string(name) + " must be in [0, 2**32); got " + std::to_string(value) +
                                ". The noise contract has 32 bits for it.");
}

// Elements of a sample that the noise contract can count.
inline void check_elements(int64_t elements) {
    if (elements <= int64_t{1} << 34) return;
    throw std::invalid_argument("a sample must have at most 2**34 elements; got " + std::to_string(elements) +
                                ". The noise contract has 32 bits for every four.");
}

inline Dtype dtype(bool bfloat16) { return bfloat16 ? Dtype::kBfloat16 : Dtype::kFloat32; }

inline Step norm_step(const Array& x, const Array& y, const Array& alpha, const Array& gamma,
                      const Array& beta, int64_t batch, int64_t channels, int64_t plane, bool channels_last,
                      bool per_sample, bool in_bfloat16, bool out_bfloat16, bool elu, float eps) {
    const int64_t count = checked_count({{"batch", batch}, {"channels", channels}, {"plane", plane}});
    const int64_t row = per_sample ? channels : 0, parameters = per_sample ? batch * channels : channels;
    const NormArgs args{batch,
                        channels,
                        plane,
                        required("x", x, count, dtype(in_bfloat16)),
                        required("y", y, count, dtype(out_bfloat16)),
                        required<const float>("alpha", alpha, parameters),
                        required<const float>("gamma", gamma, parameters),
                        required<const float>("beta", beta, parameters),
                        row,
                        row,
                        row,
                        nullptr,
                        channels_last,
                        dtype(in_bfloat16),
                        dtype(out_bfloat16),
                        elu,
                        eps};
    return [args](int isa) { instance_norm_plus_cpu(args, isa); };
}

inline Step add_elu_step(const Array& a, const Array& b, const Array& sum, const Array& y, int64_t count,
                         bool bfloat16) {
    checked_count({{"count", count}});
    const Dtype type = dtype(bfloat16);
    const AddEluArgs args{count,
                          required("a", a, count, type),
                          optional("b", b, count, type),
                          optional("sum", sum, count, type),
                          optional("y", y, count, type),
                          type};
    const bool adds = args.b != nullptr, keeps = args.sum != nullptr;
    if (count != 0 && (adds ? !keeps && args.y == nullptr : keeps || args.y == nullptr)) {
        throw std::invalid_argument("of a and b sum or y is written, of a alone y; neither was given so");
    }
    return [args](int isa) { add_elu_cpu(args, isa); };
}

inline int64_t checked_map(const Map& nhwc) {
    return checked_count({{"batch", nhwc[0]}, {"height", nhwc[1]}, {"width", nhwc[2]}, {"channels", nhwc[3]}});
}

template <PoolKind kind>
Step pool5_step(const Array& x, const Array& y, const Map& nhwc, bool bfloat16) {
    const auto [batch, height, width, channels] = nhwc;
    const int64_t count = checked_map(nhwc);
    const Dtype type = dtype(bfloat16);
    const PoolArgs args{batch, height, width, channels, required("x", x, count, type),
                        required("y", y, count, type), type};
    return [args](int isa) { pool5_cpu(kind, args, isa); };
}

inline Step mean_pool2_step(const Array& a, const Array& b, const Array& y, const Map& nhwc, bool bfloat16) {
    const auto [batch, height, width, channels] = nhwc;
    const int64_t count = checked_map(nhwc);
    if (height % 2 != 0 || width % 2 != 0) {
        throw std::invalid_argument("height and width must be even; got " + std::to_string(height) + " and " +
                                    std::to_string(width));
    }
    const Dtype type = dtype(bfloat16);
    const MeanPoolArgs args{batch,
                            height,
                            width,
                            channels,
                            required("a", a, count, type),
                            optional("b", b, count, type),
                            required("y", y, count / 4, type),
                            type};
    return [args](int isa) { mean_pool2_cpu(args, isa); };
}

inline Step resize_add_step(const Array& x, const Array& a, const Array& y, const Map& nhwc,
                            int64_t out_height, int64_t out_width, bool bfloat16) {
    const auto [batch, height, width, channels] = nhwc;
    const int64_t in = checked_map(nhwc), out = checked_map({batch, out_height, out_width, channels});
    if (in == 0 && out != 0) {
        throw std::invalid_argument("x has no pixels to resize to " + std::to_string(out_height) + "x" +
                                    std::to_string(out_width));
    }
    const Dtype type = dtype(bfloat16);
    const ResizeArgs args{batch,
                          channels,
                          height,
                          width,
                          out_height,
                          out_width,
                          required("x", x, in, type),
                          optional("a", a, out, type),
                          required("y", y, out, type),
                          type};
    return [args](int isa) { resize_add_cpu(args, isa); };
}

inline WinogradSizes winograd_sizes(int64_t in_channels, int64_t out_channels) {
    constexpr int64_t kMost = 1 << 20;
    if (std::min(in_channels, out_channels) < 1 || std::max(in_channels, out_channels) > kMost) {
        throw std::invalid_argument("channels of a Winograd convolution must be in [1, 2**20]; got " +
                                    std::to_string(in_channels) + " and " + std::to_string(out_channels));
    }
    return {in_channels, out_channels};
}

// Packed weights are int16 with scales for bfloat16 maps, else float32 without.
inline void check_scales(const Array& scales, bool bfloat16) {
    if ((scales.address != 0) == bfloat16) return;
    throw std::invalid_argument(bfloat16 ? "weights for bfloat16 maps have scales; there are none"
                                         : "weights for float32 maps have no scales; some were given");
}

inline Step winograd_step(const Array& x, const Array& values, const Array& scales, const Array& bias,
                          const Array& out, const Map& nhwc, int64_t out_channels, int64_t dilation,
                          bool accumulate, bool bfloat16) {
    const auto [batch, height, width, channels] = nhwc;
    const WinogradSizes sizes = winograd_sizes(channels, out_channels);
    const int64_t from = checked_map(nhwc), to = checked_map({batch, height, width, out_channels});
    if (dilation < 1 || dilation > 0x7fffffffll) {
        throw std::invalid_argument("dilation must be in [1, 2**31); got " + std::to_string(dilation));
    }
    check_scales(scales, bfloat16);
    const Dtype type = dtype(bfloat16);
    const WinogradArgs args{batch,
                            height,
                            width,
                            channels,
                            out_channels,
                            dilation,
                            required("x", x, from, type),
                            required("values", values, sizes.values, type),
                            optional<const float>("scales", scales, sizes.scales),
                            optional<const float>("bias", bias, out_channels),
                            required("out", out, to, type),
                            accumulate,
                            type};
    return [args](int isa) { winograd_conv_cpu(args, isa); };
}

// `k` are the numbers of a Row in order.
inline Row update_row(const double* k, int64_t step, int64_t ref_step) {
    const auto at = [k](int i) { return static_cast<float>(k[i]); };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10),
            checked_uint32("step", step), checked_uint32("ref_step", ref_step)};
}

// A dense map without padding channels.
inline MapLayout dense_layout(bool bfloat16, bool channels_last, int64_t channels, int64_t plane) {
    return {dtype(bfloat16), channels * plane, channels_last ? 1 : plane, channels_last ? channels : 1,
            channels};
}

// What an update reads and writes in each of its forms: state, keys of the noise, what is known.
inline UpdateArgs state_args(int64_t batch, int64_t channels, int64_t plane, const Array& x, const Array& h,
                             const Array& samples, const Array& noise_weights, const Array& mask,
                             const Array& known, const Array& nonfinite) {
    const int64_t count = checked_count({{"batch", batch}, {"channels", channels}, {"plane", plane}});
    check_elements(channels * plane);
    if ((mask.address == 0) != (known.address == 0)) {
        throw std::invalid_argument("mask and known come together; only one of them was given");
    }
    UpdateArgs args{};
    args.batch = batch, args.channels = channels, args.plane = plane;
    args.x = required<float>("x", x, count), args.h = optional<float>("h", h, count);
    args.samples = required<const int64_t>("samples", samples, batch);
    args.noise_weights = optional<const float>("noise_weights", noise_weights, 2 * batch);
    args.mask = optional<const uint8_t>("mask", mask, count);
    args.known = optional<const float>("known", known, count);
    args.nonfinite = optional<int32_t>("nonfinite", nonfinite, batch);
    return args;
}

// An update on dense maps, without its row.
inline UpdateArgs update_args(const Array& x, const Array& f, const Array& h, int64_t batch, int64_t channels,
                              int64_t plane, bool f_bfloat16, bool f_channels_last, int64_t seed,
                              const Array& samples, const Array& noise_weights, const Array& mask,
                              const Array& known, const Array& net_input, bool net_bfloat16,
                              bool net_channels_last, const Array& nonfinite) {
    UpdateArgs args = state_args(batch, channels, plane, x, h, samples, noise_weights, mask, known, nonfinite);
    const int64_t count = batch * channels * plane;
    args.f = required("f", f, count, dtype(f_bfloat16));
    args.f_layout = dense_layout(f_bfloat16, f_channels_last, channels, plane);
    args.seed = checked_uint32("seed", seed);
    args.net_input = optional("net_input", net_input, count, dtype(net_bfloat16));
    args.net_layout = dense_layout(net_bfloat16, net_channels_last, channels, plane);
    return args;
}

}  // namespace ncsn_fast
