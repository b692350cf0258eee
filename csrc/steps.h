// Conversion of Python arguments (addresses and sizes) to steps of a plan.
#pragma once

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "cpu/plan.h"

namespace ncsn_fast {

using Address = uintptr_t;
using Map = std::array<int64_t, 4>;  // batch, height, width, channels

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

inline uint32_t checked_uint32(const char* name, int64_t value) {
    if (value >= 0 && value <= 0xffffffffll) return static_cast<uint32_t>(value);
    throw std::invalid_argument(std::string(name) + " must be in [0, 2**32); got " + std::to_string(value) +
                                ". The noise contract has 32 bits for it.");
}

inline void check_sizes(int64_t batch, int64_t channels, int64_t plane) {
    if (batch >= 0 && channels >= 0 && plane >= 0) return;
    throw std::invalid_argument("sizes must not be negative; got batch " + std::to_string(batch) +
                                ", channels " + std::to_string(channels) + ", plane " +
                                std::to_string(plane));
}

inline void check_map(int64_t batch, int64_t height, int64_t width, int64_t channels) {
    check_sizes(batch, channels, std::min(height, width));
}

inline Dtype dtype(bool bfloat16) { return bfloat16 ? Dtype::kBfloat16 : Dtype::kFloat32; }

inline Step norm_step(Address x, Address y, Address alpha, Address gamma, Address beta, int64_t batch,
                      int64_t channels, int64_t plane, bool channels_last, bool per_sample,
                      bool in_bfloat16, bool out_bfloat16, bool elu, float eps) {
    check_sizes(batch, channels, plane);
    const int64_t row = per_sample ? channels : 0;
    const NormArgs args{batch,
                        channels,
                        plane,
                        pointer<const void>(x),
                        pointer<void>(y),
                        pointer<const float>(alpha),
                        pointer<const float>(gamma),
                        pointer<const float>(beta),
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

inline Step add_elu_step(Address a, Address b, Address sum, Address y, int64_t count, bool bfloat16) {
    check_sizes(1, 1, count);
    const AddEluArgs args{count,
                          pointer<const void>(a),
                          pointer<const void>(b),
                          pointer<void>(sum),
                          pointer<void>(y),
                          dtype(bfloat16)};
    return [args](int isa) { add_elu_cpu(args, isa); };
}

template <PoolKind kind>
Step pool5_step(Address x, Address y, const Map& nhwc, bool bfloat16) {
    const auto [batch, height, width, channels] = nhwc;
    check_map(batch, height, width, channels);
    const PoolArgs args{
        batch, height, width, channels, pointer<const void>(x), pointer<void>(y), dtype(bfloat16)};
    return [args](int isa) { pool5_cpu(kind, args, isa); };
}

inline Step mean_pool2_step(Address a, Address b, Address y, const Map& nhwc, bool bfloat16) {
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
    return [args](int isa) { mean_pool2_cpu(args, isa); };
}

inline Step resize_add_step(Address x, Address a, Address y, const Map& nhwc, int64_t out_height,
                            int64_t out_width, bool bfloat16) {
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
    return [args](int isa) { resize_add_cpu(args, isa); };
}

inline Step winograd_step(Address x, Address values, Address scales, Address bias, Address out,
                          const Map& nhwc, int64_t out_channels, int64_t dilation, bool accumulate,
                          bool bfloat16) {
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
    return [args](int isa) { winograd_conv_cpu(args, isa); };
}

inline Row update_row(const double* k, double c_ref, int64_t step, int64_t ref_step) {
    const auto as_float = [](double v) { return static_cast<float>(v); };
    return {as_float(k[0]), as_float(k[1]), as_float(k[2]), as_float(k[3]), as_float(k[4]),
            as_float(k[5]), as_float(c_ref), checked_uint32("step", step),
            checked_uint32("ref_step", ref_step)};
}

// A dense map without padding channels.
inline MapLayout dense_layout(bool bfloat16, bool channels_last, int64_t channels, int64_t plane) {
    return {dtype(bfloat16), channels * plane, channels_last ? 1 : plane, channels_last ? channels : 1,
            channels};
}

// Update arguments without the row.
inline UpdateArgs update_args(Address x, Address f, Address h, int64_t batch, int64_t channels,
                              int64_t plane, bool f_bfloat16, bool f_channels_last, int64_t seed,
                              Address samples, Address noise_weights, Address mask, Address known,
                              Address net_input, bool net_bfloat16, bool net_channels_last, float scale,
                              float shift, Address nonfinite) {
    check_sizes(batch, channels, plane);
    UpdateArgs args{};
    args.batch = batch, args.channels = channels, args.plane = plane;
    args.x = pointer<float>(x), args.h = pointer<float>(h), args.f = pointer<const void>(f);
    args.f_layout = dense_layout(f_bfloat16, f_channels_last, channels, plane);
    args.seed = checked_uint32("seed", seed), args.samples = pointer<const int64_t>(samples);
    args.noise_weights = pointer<const float>(noise_weights);
    args.mask = pointer<const uint8_t>(mask), args.known = pointer<const float>(known);
    args.net_input = pointer<void>(net_input), args.scale = scale, args.shift = shift;
    args.net_layout = dense_layout(net_bfloat16, net_channels_last, channels, plane);
    args.nonfinite = pointer<int32_t>(nonfinite);
    return args;
}

}  // namespace ncsn_fast
