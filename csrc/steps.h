// Conversion of Python arguments (arrays and sizes) to steps of a plan. Throws std::invalid_argument for
// arguments that do not fit together.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "cpu/plan.h"
#include "maps.h"

namespace ncsn_fast {

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

inline Step norm_step(const Array& x, const Array& y, const Array& alpha, const Array& gamma,
                      const Array& beta, int64_t batch, int64_t channels, int64_t plane, bool channels_last,
                      bool per_sample, bool in_bfloat16, bool out_bfloat16, bool elu, float eps,
                      const Array& strip_sums, int64_t width, int64_t border) {
    const Map nhwc = norm_map(batch, channels, plane, channels_last, strip_sums, width, border);
    const WrittenMap out = required_map("y", y, nhwc, border, dtype(out_bfloat16));
    if (!channels_last) required("y", y, checked_map(nhwc), dtype(out_bfloat16));  // it has no row
    const int64_t row = per_sample ? channels : 0, parameters = per_sample ? batch * channels : channels;
    const NormArgs args{batch,
                        channels,
                        plane,
                        required("x", x, checked_map(nhwc), dtype(in_bfloat16)),
                        out.first,
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
    const NormContext context = norm_context(nhwc, strip_sums, out.pixels);
    return [args, context](int isa) { instance_norm_plus_cpu(args, context, isa); };
}

inline Step zero_around_step(const Array& y, const Map& nhwc, int64_t border) {
    const PaddedMap map = checked_padded(nhwc, border);
    auto* const memory = required<Bfloat16>("y", y, map.elements);
    return [=](int) { zero_around_cpu(memory, map, nhwc[0], nhwc[3], border); };
}

inline Activation activation(int64_t code) {
    if (code >= 0 && code < kActivations) return static_cast<Activation>(code);
    throw std::invalid_argument("activation must be in [0, " + std::to_string(kActivations) + "); got " +
                                std::to_string(code) + ". ncsn_fast.ops.activations has their numbers.");
}

inline Step add_activation_step(const Array& a, const Array& b, const Array& sum, const Array& y,
                                int64_t pixels, int64_t channels, bool bfloat16, int64_t code, float a_weight,
                                float b_weight, const Map& nhwc, int64_t border) {
    const int64_t count = checked_count({{"pixels", pixels}, {"channels", channels}});
    const Dtype type = dtype(bfloat16);
    if (border != kDense && (checked_map(nhwc) != count || nhwc[3] != channels)) {
        throw std::invalid_argument("maps must have `pixels` of `channels`, " + std::to_string(pixels) + " of " +
                                    std::to_string(channels) + "; got " + std::to_string(checked_map(nhwc)) +
                                    " elements in " + std::to_string(nhwc[3]) + " channels");
    }
    const Map map = border == kDense ? Map{1, pixels, 1, channels} : nhwc;
    const WrittenMap total = written_map("sum", sum, map, kDense, type);
    const WrittenMap out = written_map("y", y, map, border, type);
    const bool dense = border == kDense && total.pixels.pixel == channels && out.pixels.pixel == channels;
    const AddActivationArgs args{count,
                                 dense ? 0 : channels,
                                 required("a", a, count, type),
                                 optional("b", b, count, type),
                                 total.first,
                                 out.first,
                                 type,
                                 activation(code),
                                 a_weight,
                                 b_weight,
                                 total.pixels,
                                 out.pixels};
    const bool adds = args.b != nullptr, keeps = args.sum != nullptr;
    if (count != 0 && (adds ? !keeps && args.y == nullptr : keeps || args.y == nullptr)) {
        throw std::invalid_argument("of a and b sum or y is written, of a alone y; neither was given so");
    }
    return [args](int isa) { add_activation_cpu(args, isa); };
}

inline Step add_elu_step(const Array& a, const Array& b, const Array& sum, const Array& y, int64_t count,
                         bool bfloat16) {
    const auto elu = static_cast<int64_t>(Activation::kElu);
    return add_activation_step(a, b, sum, y, 1, count, bfloat16, elu, 1.0f, 1.0f, {}, kDense);
}

template <PoolKind kind>
Step pool5_step(const Array& x, const Array& y, const Map& nhwc, bool bfloat16, int64_t border) {
    const auto [batch, height, width, channels] = nhwc;
    const Dtype type = dtype(bfloat16);
    const WrittenMap out = required_map("y", y, nhwc, border, type);
    const PoolArgs args{batch,     height,     width, channels, required("x", x, checked_map(nhwc), type),
                        out.first, out.pixels, type};
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

inline void check_groups(int64_t groups, int64_t channels) {
    if (groups >= 1 && channels % groups == 0) return;
    throw std::invalid_argument("groups must divide the channels; got " + std::to_string(groups) +
                                " groups of " + std::to_string(channels) + " channels");
}

inline Step group_norm_step(const Array& x, const Array& y, const Array& gamma, const Array& beta,
                            const Array& add, const Array& scale, const Array& shift, int64_t batch,
                            int64_t channels, int64_t plane, int64_t groups, bool channels_last,
                            bool in_bfloat16, bool out_bfloat16, int64_t code, float eps,
                            const Array& strip_sums, int64_t width, int64_t border) {
    const Map nhwc = norm_map(batch, channels, plane, channels_last, strip_sums, width, border);
    check_groups(groups, channels);
    const WrittenMap out = required_map("y", y, nhwc, border, dtype(out_bfloat16));
    const int64_t rows = batch * channels;
    if (!channels_last) required("y", y, checked_map(nhwc), dtype(out_bfloat16));  // it has no row
    const GroupNormArgs args{batch,
                             channels,
                             plane,
                             groups,
                             required("x", x, checked_map(nhwc), dtype(in_bfloat16)),
                             out.first,
                             optional<const float>("gamma", gamma, channels),
                             optional<const float>("beta", beta, channels),
                             optional<const float>("add", add, rows),
                             optional<const float>("scale", scale, rows),
                             optional<const float>("shift", shift, rows),
                             channels_last,
                             dtype(in_bfloat16),
                             dtype(out_bfloat16),
                             activation(code),
                             eps};
    const NormContext context = norm_context(nhwc, strip_sums, out.pixels);
    return [args, context](int isa) { group_norm_cpu(args, context, isa); };
}

inline Step scale_shift_step(const Array& x, const Array& y, const Array& scale, const Array& shift,
                             int64_t batch, int64_t channels, int64_t plane, bool channels_last,
                             bool in_bfloat16, bool out_bfloat16, int64_t code) {
    const int64_t count = checked_count({{"batch", batch}, {"channels", channels}, {"plane", plane}});
    const int64_t rows = batch * channels;
    const ScaleShiftArgs args{batch,
                              channels,
                              plane,
                              required("x", x, count, dtype(in_bfloat16)),
                              required("y", y, count, dtype(out_bfloat16)),
                              optional<const float>("scale", scale, rows),
                              optional<const float>("shift", shift, rows),
                              channels_last,
                              dtype(in_bfloat16),
                              dtype(out_bfloat16),
                              activation(code)};
    return [args](int isa) { scale_shift_cpu(args, isa); };
}

// Channels x_first .. x_first + channels - 1 of x become y_first .. of y.
inline Step copy_channels_step(const Array& x, const Array& y, int64_t pixels, int64_t channels,
                               int64_t x_channels, int64_t x_first, int64_t y_channels, int64_t y_first,
                               bool in_bfloat16, bool out_bfloat16) {
    checked_count({{"pixels", pixels}, {"channels", channels}});
    const int64_t from = checked_count({{"pixels", pixels}, {"x_channels", x_channels}});
    const int64_t to = checked_count({{"pixels", pixels}, {"y_channels", y_channels}});
    if (x_first < 0 || y_first < 0 || x_first > x_channels - channels || y_first > y_channels - channels) {
        throw std::invalid_argument(std::to_string(channels) + " channels must lie within x from channel " +
                                    std::to_string(x_first) + " and within y from channel " +
                                    std::to_string(y_first) + "; these have " + std::to_string(x_channels) +
                                    " and " + std::to_string(y_channels));
    }
    const Dtype in = dtype(in_bfloat16), out = dtype(out_bfloat16);
    const auto* first = static_cast<const char*>(required("x", x, from, in));
    auto* const target = static_cast<char*>(required("y", y, to, out));
    const CopyChannelsArgs args{pixels,     channels,   first + x_first * (in_bfloat16 ? 2 : 4),
                                target + y_first * (out_bfloat16 ? 2 : 4),
                                x_channels, y_channels, in,
                                out};
    return [args](int isa) { copy_channels_cpu(args, isa); };
}

inline Step upsample_nearest_step(const Array& x, const Array& y, const Map& nhwc, int64_t rows,
                                  int64_t columns, bool bfloat16) {
    const auto [batch, height, width, channels] = nhwc;
    const int64_t from = checked_map(nhwc), lines = checked_count({{"height", height}, {"rows", rows}});
    const int64_t along = checked_count({{"width", width}, {"columns", columns}});
    checked_map({batch, lines, along, channels});
    const Dtype type = dtype(bfloat16);
    const PixelRows written = required_pixels("y", y, batch * lines * along, channels, type);
    const UpsampleArgs args{batch, height, width, channels, rows, columns, required("x", x, from, type),
                            written.first, written.row, type};
    return [args](int isa) { upsample_nearest_cpu(args, isa); };
}

// `channels` of `nhwc` are those of y; z has factor^2 times as many.
inline Step depth_to_space_step(const Array& z, const Array& y, const Map& nhwc, int64_t out_height,
                                int64_t out_width, int64_t factor, int64_t first, bool bfloat16) {
    const auto [batch, height, width, channels] = nhwc;
    const int64_t lines = checked_count({{"height", height}, {"factor", factor}});
    const int64_t pixels = checked_count({{"width", width}, {"factor", factor}});
    const int64_t from = checked_map({batch, lines, pixels, channels});
    checked_map({batch, out_height, out_width, channels});
    if (factor < 1 || first < 0 || first > lines - out_height || first > pixels - out_width) {
        throw std::invalid_argument("factor must be at least 1, and y lie within the squares of z; got " +
                                    std::to_string(out_height) + "x" + std::to_string(out_width) +
                                    " from pixel " + std::to_string(first) + " of " + std::to_string(lines) +
                                    "x" + std::to_string(pixels));
    }
    const Dtype type = dtype(bfloat16);
    const PixelRows written = required_pixels("y", y, batch * out_height * out_width, channels, type);
    const DepthToSpaceArgs args{batch,     height, width, channels, out_height, out_width, factor, first,
                                required("z", z, from, type), written.first, written.row, type};
    return [args](int isa) { depth_to_space_cpu(args, isa); };
}

inline Step softmax_step(const Array& x, int64_t rows, int64_t columns, float scale, bool bfloat16) {
    const int64_t count = checked_count({{"rows", rows}, {"columns", columns}});
    const Dtype type = dtype(bfloat16);
    const SoftmaxArgs args{rows, columns, required("x", x, count, type), scale, type};
    return [args](int isa) { softmax_cpu(args, isa); };
}

// weight (taps, taps, channels), bias (channels,).
inline Step depthwise_transposed_step(const Array& x, const Array& weight, const Array& bias, const Array& y,
                                      const Map& nhwc, int64_t out_height, int64_t out_width, int64_t taps,
                                      int64_t stride, int64_t padding, bool bfloat16) {
    const auto [batch, height, width, channels] = nhwc;
    const int64_t from = checked_map(nhwc), to = checked_map({batch, out_height, out_width, channels});
    constexpr int64_t kMost = 1 << 20;
    if (std::min(taps, stride) < 1 || padding < 0 || std::max({taps, stride, padding}) > kMost) {
        throw std::invalid_argument("taps and stride must be in [1, 2**20], padding in [0, 2**20]; got " +
                                    std::to_string(taps) + ", " + std::to_string(stride) + " and " +
                                    std::to_string(padding));
    }
    const int64_t weights = checked_count({{"taps", taps}, {"taps", taps}, {"channels", channels}});
    const Dtype type = dtype(bfloat16);
    const DepthwiseTransposedArgs args{batch,
                                       height,
                                       width,
                                       channels,
                                       out_height,
                                       out_width,
                                       taps,
                                       stride,
                                       padding,
                                       required("x", x, from, type),
                                       required<const float>("weight", weight, weights),
                                       optional<const float>("bias", bias, channels),
                                       required("y", y, to, type),
                                       type};
    return [args](int isa) { depthwise_transposed_cpu(args, isa); };
}

// Elements from the first of all tokens to the last.
inline int64_t token_elements(int64_t tokens, int64_t heads, int64_t width, const Tokens& layout) {
    const int64_t count = checked_count({{"tokens", tokens}, {"heads", heads}, {"width", width}});
    const int64_t rows = checked_count({{"tokens", tokens}, {"row", layout.row}});
    const int64_t parts = checked_count({{"heads", heads}, {"head", layout.head}});
    return count == 0 ? 0 : rows - layout.row + parts - layout.head + width;
}

inline Step attention_step(const Array& q, const Array& k, const Array& v, const Array& out,
                           const std::array<int64_t, 6>& sizes, const std::array<int64_t, 2>& q_layout,
                           const std::array<int64_t, 2>& k_layout, const std::array<int64_t, 2>& v_layout,
                           const std::array<int64_t, 2>& out_layout, float scale, bool bfloat16) {
    const auto [batch, heads, queries, keys, width, value_width] = sizes;
    const auto tokens = [](const std::array<int64_t, 2>& layout) { return Tokens{layout[0], layout[1]}; };
    const int64_t asking = checked_count({{"batch", batch}, {"queries", queries}});
    const int64_t asked = checked_count({{"batch", batch}, {"keys", keys}});
    checked_count({{"batch", batch}, {"heads", heads}, {"queries", queries}, {"keys", keys}});
    // Workspace of a thread.
    checked_count({{"keys", keys}, {"width and value_width", checked_count({{"width", width}, {"rows", 64}}) +
                                                                checked_count({{"value_width", value_width},
                                                                               {"rows", 64}})}});
    if (keys == 0 && asking != 0) throw std::invalid_argument("k and v must have tokens; got keys 0");
    const Tokens written = tokens(out_layout);
    const int64_t elements = token_elements(asking, heads, value_width, written);
    if (written.head < value_width || written.row < (heads - 1) * written.head + value_width) {
        throw std::invalid_argument("heads of out must lie apart, within a row; got width " +
                                    std::to_string(value_width) + ", " + std::to_string(written.head) +
                                    " between heads and " + std::to_string(written.row) + " between rows");
    }
    const Dtype type = dtype(bfloat16);
    const AttentionArgs args{
        batch,
        heads,
        queries,
        keys,
        width,
        value_width,
        required("q", q, token_elements(asking, heads, width, tokens(q_layout)), type),
        required("k", k, token_elements(asked, heads, width, tokens(k_layout)), type),
        required("v", v, token_elements(asked, heads, value_width, tokens(v_layout)), type),
        required("out", out, elements, type),
        tokens(q_layout),
        tokens(k_layout),
        tokens(v_layout),
        written,
        scale,
        type};
    return [args](int isa) { attention_cpu(args, isa); };
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
                          const Array& added, const Array& out, const Map& nhwc, int64_t out_channels,
                          int64_t dilation, bool bfloat16) {
    const auto [batch, height, width, channels] = nhwc;
    const WinogradSizes sizes = winograd_sizes(channels, out_channels);
    const int64_t from = checked_map(nhwc), to = checked_map({batch, height, width, out_channels});
    if (dilation < 1 || dilation > 0x7fffffffll) {
        throw std::invalid_argument("dilation must be in [1, 2**31); got " + std::to_string(dilation));
    }
    check_scales(scales, bfloat16);
    const Dtype type = dtype(bfloat16);
    const PixelRows written = required_pixels("out", out, batch * height * width, out_channels, type);
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
                            optional("added", added, to, type),
                            written.first,
                            written.row,
                            type};
    return [args](int isa) { winograd_conv_cpu(args, isa); };
}

inline TileConvSizes tile_conv_sizes(int64_t in_channels, int64_t out_channels, int64_t taps) {
    constexpr int64_t kMost = 1 << 20;
    if (std::min(in_channels, out_channels) < 1 || std::max(in_channels, out_channels) > kMost) {
        throw std::invalid_argument("channels of a convolution in tiles must be in [1, 2**20]; got " +
                                    std::to_string(in_channels) + " and " + std::to_string(out_channels));
    }
    if (taps != 1 && taps != 3) {
        throw std::invalid_argument("taps of a convolution in tiles must be 1 or 3 a side; got " +
                                    std::to_string(taps));
    }
    return {in_channels, out_channels, taps};
}

// Borders of x and y are -1 where the map is dense.
inline Step tile_conv_step(const Array& x, const Array& values, const Array& bias, const Array& added,
                           const Array& sum, const Array& y, const Array& strip_sums, const Map& nhwc,
                           int64_t out_channels, int64_t taps, int64_t dilation, int64_t code, int64_t border,
                           int64_t y_border) {
    const auto [batch, height, width, channels] = nhwc;
    const TileConvSizes sizes = tile_conv_sizes(channels, out_channels, taps);
    const Map written{batch, height, width, out_channels};
    const int64_t from = border == kDense ? checked_map(nhwc) : checked_padded(nhwc, border).elements;
    const int64_t to = checked_map(written);
    checked_map({batch, height, width, sizes.channels});
    if (dilation < 1 || dilation > 0x7fffffffll) {
        throw std::invalid_argument("dilation must be in [1, 2**31); got " + std::to_string(dilation));
    }
    const int64_t reach = taps / 2 * std::min(dilation, std::max(height, width));
    if (border != kDense && border < reach) {
        throw std::invalid_argument("the border of x must be at least " + std::to_string(reach) + ", or -1; got " +
                                    std::to_string(border));
    }
    const WrittenMap total = written_map("sum", sum, written, kDense, Dtype::kBfloat16);
    const WrittenMap out = written_map("y", y, written, y_border, Dtype::kBfloat16);
    const TileConvArgs args{batch,
                            height,
                            width,
                            channels,
                            out_channels,
                            taps,
                            dilation,
                            required<const Bfloat16>("x", x, from),
                            border,
                            required<const Bfloat16>("values", values, sizes.values),
                            optional<const float>("bias", bias, out_channels),
                            optional<const Bfloat16>("added", added, to),
                            static_cast<Bfloat16*>(total.first),
                            optional<float>("strip_sums", strip_sums, strip_sums_of(written)),
                            static_cast<Bfloat16*>(out.first),
                            out.pixels,
                            total.pixels.pixel,
                            activation(code)};
    if (to != 0 && args.sum == nullptr && (args.y == nullptr || args.strip_sums != nullptr)) {
        throw std::invalid_argument("of a convolution sum, y or both is written, and sum with strip_sums; it was "
                                    "not given");
    }
    return [args](int isa) { tile_conv_cpu(args, isa); };
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
