// 3x3 convolution by Winograd's F(4x4, 3x3) on the CPU; the equation is in ncsn_fast/winograd.h. Bound by
// arithmetic: a quarter of the multiplications of the direct sum, at twice the rate of float32 for
// bfloat16 maps, and about a fifth more for the transforms.
//
// A unit of work is a block of tiles and a group of panels of output channels: the block's transformed
// inputs stay in the second-level cache while the weights pass by. Every tile is computed by itself.
#include <omp.h>

#include "lanes.h"
#include "ncsn_fast/elementary.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int kTile = kWinogradTile, kWindow = kWinogradWindow, kPoints = kWinogradPoints;
constexpr int kPanel = kWinogradPanel;
constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
constexpr float kSmallestMaximum = 0x1p-110f;  // its reciprocal is finite

using Ints = Lanes<int32_t, kLanes>;

// A kind of products has sums of kRows tiles by kRegisters registers of output channels, which fill the
// registers of the processor.

// Pairs of 16-bit integers: sum += u[0] x[0] + u[1] x[1] in each lane, exactly.
struct FixedPoint {
    using Element = int16_t;
    using Sum = Ints;
    static constexpr int kGroup = 2;
    static constexpr int kRegisters = 2, kRows = kLanes == 16 ? 14 : 6;
    static constexpr bool kScaled = true;

    static inline Ints weights(const int16_t* u) { return load_bits<Ints>(u); }
    static inline Ints inputs(const int16_t* v) { return Ints{} + load_bits<int32_t>(v); }

    static inline void add(Ints& sum, Ints u, Ints x) {
#if defined(__AVX512BW__)
        sum += (Ints)_mm512_madd_epi16((__m512i)u, (__m512i)x);
#elif defined(__AVX2__)
        sum += (Ints)_mm256_madd_epi16((__m256i)u, (__m256i)x);
#else
        sum += (u << 16 >> 16) * (x << 16 >> 16) + (u >> 16) * (x >> 16);
#endif
    }

    static inline Vec value(Ints sum, Vec scale) { return __builtin_convertvector(sum, Vec) * scale; }
};

// The same in one VNNI instruction. In assembly because the levels are compiled without VNNI, and because
// GCC 12 would spill the sums.
#if defined(__AVX512BW__)
struct FixedPointVnni : FixedPoint {
    static inline void add(Ints& sum, Ints u, Ints x) {
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
    }
};
#elif defined(__AVX2__)
struct FixedPointVnni : FixedPoint {
    static inline void add(Ints& sum, Ints u, Ints x) {
        asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(x));
    }
};

struct FixedPointVnniNarrow : FixedPoint {
    static inline void add(Ints& sum, Ints u, Ints x) {
        asm("%{evex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(x));
    }
};
#endif

struct FloatingPoint {
    using Element = float;
    using Sum = Vec;
    static constexpr int kGroup = 1;
    // The weights of a channel are whole cache lines, which is what counts where few tiles share them.
    static constexpr int kRegisters = kLanes == 16 ? 2 : 4, kRows = kLanes == 16 ? 14 : 3;
    static constexpr bool kScaled = false;

    static inline Vec weights(const float* u) { return load_lanes<kLanes>(u); }
    static inline Vec inputs(const float* v) { return Vec{} + *v; }

    static inline void add(Vec& sum, Vec u, Vec x) { sum = multiply_add(u, x, sum); }

    static inline Vec value(Vec sum, Vec) { return sum; }
};

// A thread's workspace for a unit of work.
template <class Element>
struct Block {
    Element* inputs;   // [point][tile][channel], transformed
    float* scales;     // [point][tile], of the inputs
    float* products;   // [tile][point][output channel of a panel]
    float* unrounded;  // [channel / kLanes][point][kLanes]: inputs of one tile
    const void* zeros;  // a pixel outside the map
    int64_t first, tiles;
    int64_t channels, point_stride;
};

// A tile's first output pixel.
struct Corner {
    int64_t sample, row, column;
};

static inline Corner corner_of(const WinogradArgs& args, const WinogradPlan& plan, int64_t tile) {
    const int64_t step = kTile * args.dilation;
    const int64_t along = tile % plan.tiles_along, down = tile / plan.tiles_along % plan.tiles_down;
    const int64_t map = tile / plan.tiles_along / plan.tiles_down;
    const int64_t sample = map / plan.phases_along / plan.phases_down;
    return {sample, map / plan.phases_along % plan.phases_down + down * step,
            map % plan.phases_along + along * step};
}

template <class T>
static inline Vec load_some(const T* p, int64_t count) {
    if (count >= kLanes) return load_lanes<kLanes>(p);
    T part[kLanes] = {};
    if (count > 0) memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
    return load_lanes<kLanes>(part);
}

template <class T>
static inline void store_some(T* p, Vec v, int64_t count) {
    if (count >= kLanes) return store_lanes<kLanes>(p, v);
    T part[kLanes];
    store_lanes<kLanes>(part, v);
    memcpy(p, part, static_cast<size_t>(count) * sizeof(T));
}

template <int n>
static inline int32_t largest_lane(Lanes<int32_t, n> v) {
    if constexpr (n == 1) {
        return v[0];
    } else {
        Lanes<int32_t, n / 2> half[2];
        memcpy(half, &v, sizeof v);
        return largest_lane<n / 2>(half[0] > half[1] ? half[0] : half[1]);
    }
}

// B^T x B of kLanes channels from c of the window at `pixels`.
template <class T>
static inline void transform_window(const T* const* pixels, int64_t c, int64_t channels, float* out,
                                    int64_t stride) {
    Vec window[kPoints], points[kWindow];
    if (c + kLanes <= channels) {
        for (int p = 0; p < kPoints; ++p) window[p] = load_lanes<kLanes>(pixels[p] + c);
    } else {
        for (int p = 0; p < kPoints; ++p) window[p] = load_some(pixels[p] + c, channels - c);
    }
    NCSN_UNROLL
    for (int j = 0; j < kWindow; ++j) winograd_input(window + j, window + j, kWindow);
    NCSN_UNROLL
    for (int i = 0; i < kWindow; ++i) {
        winograd_input(window + i * kWindow, points, 1);
        NCSN_UNROLL
        for (int j = 0; j < kWindow; ++j) {
            store_lanes<kLanes>(out + (i * kWindow + j) * stride, points[j]);
        }
    }
}

// Rounds a tile's inputs at one point to integers and returns their scale, a NaN unless all are finite.
static inline float round_point(const float* unrounded, int64_t channels, int16_t* out) {
    Ints largest{};
    for (int64_t c = 0; c < channels; c += kLanes) {
        const Ints magnitude =
            load_bits<Ints>(unrounded + c * kPoints) & static_cast<int32_t>(kMagnitude);
        largest = magnitude > largest ? magnitude : largest;
    }
    const auto bits = static_cast<uint32_t>(largest_lane<kLanes>(largest));
    const float found = bits_float(bits);
    const float maximum = found < kSmallestMaximum ? kSmallestMaximum : found;
    const float inverse = bits < kInfinity ? kWinogradLevels / maximum : 0.0f;
    for (int64_t c = 0; c < channels; c += kLanes) {
        const Vec value = load_lanes<kLanes>(unrounded + c * kPoints);
        const Ints rounded = (Ints)(value * inverse + kRoundToInteger);
        store_bits(out + c, __builtin_convertvector(rounded, Lanes<int16_t, kLanes>));
    }
    return bits < kInfinity ? maximum * (1.0f / kWinogradLevels) : __builtin_nanf("");
}

// Fills tile t of the block.
template <class Kind, class T>
static void transform_tile(const Block<typename Kind::Element>& block, const T* const* pixels,
                           int64_t channels, int64_t t) {
    auto* const inputs = block.inputs + t * block.channels;
    if constexpr (Kind::kScaled) {
        for (int64_t c = 0; c < block.channels; c += kLanes) {
            transform_window(pixels, c, channels, block.unrounded + c * kPoints, kLanes);
        }
        for (int p = 0; p < kPoints; ++p) {
            block.scales[p * block.tiles + t] = round_point(
                block.unrounded + p * kLanes, block.channels, inputs + p * block.point_stride);
        }
    } else {
        for (int64_t c = 0; c < block.channels; c += kLanes) {
            transform_window(pixels, c, channels, inputs + c, block.point_stride);
        }
    }
}

// Multiplies some tiles by a panel at one point.
template <class Element>
struct Product {
    const Element *v, *u;
    const float *v_scales, *u_scales;
    float* out;
    int64_t channels;
};

// Adds up `count` channels from `first`; the first chunk overwrites. Not inlined: the sums then stay in
// registers.
template <class Kind, int rows>
static __attribute__((noinline)) void multiply_chunk(const Product<typename Kind::Element>& product,
                                                     int64_t first, int64_t count) {
    constexpr int64_t kStride = kPoints * kPanel;
    constexpr int kRegisters = Kind::kRegisters;
    const int64_t channels = product.channels;
    for (int part = 0; part < kPanel; part += kRegisters * kLanes) {
        typename Kind::Sum sum[rows][kRegisters];
        NCSN_UNROLL
        for (int r = 0; r < rows; ++r) {
            for (int k = 0; k < kRegisters; ++k) sum[r][k] = typename Kind::Sum{};
        }
        const auto* u = product.u + first * kPanel + part * Kind::kGroup;
        const auto* v = product.v + first;
        for (const auto* end = v + count; v != end; v += Kind::kGroup, u += kPanel * Kind::kGroup) {
            typename Kind::Sum w[kRegisters];
            NCSN_UNROLL
            for (int k = 0; k < kRegisters; ++k) w[k] = Kind::weights(u + k * kLanes * Kind::kGroup);
            NCSN_UNROLL
            for (int r = 0; r < rows; ++r) {
                const auto x = Kind::inputs(v + r * channels);
                NCSN_UNROLL
                for (int k = 0; k < kRegisters; ++k) Kind::add(sum[r][k], w[k], x);
            }
        }
        Vec scale[kRegisters] = {};
        if constexpr (Kind::kScaled) {
            for (int k = 0; k < kRegisters; ++k) {
                scale[k] = load_lanes<kLanes>(product.u_scales + part + k * kLanes);
            }
        }
        float* out = product.out + part;
        NCSN_UNROLL
        for (int r = 0; r < rows; ++r) {
            const float tile_scale = Kind::kScaled ? product.v_scales[r] : 1.0f;
            for (int k = 0; k < kRegisters; ++k) {
                Vec value = Kind::value(sum[r][k], scale[k] * tile_scale);
                float* to = out + r * kStride + k * kLanes;
                if (first > 0) value += load_lanes<kLanes>(to);
                store_lanes<kLanes>(to, value);
            }
        }
    }
}

template <class Kind, int rows>
static inline void multiply(const Product<typename Kind::Element>& product, int64_t tiles) {
    if constexpr (rows > 1) {
        if (tiles < rows) return multiply<Kind, rows - 1>(product, tiles);
    }
    for (int64_t c = 0; c < product.channels; c += kWinogradChunk) {
        multiply_chunk<Kind, rows>(product, c, smaller(kWinogradChunk, product.channels - c));
    }
}

// Products of all tiles of the block with a panel.
template <class Kind>
static void multiply_panel(const WinogradArgs& args, const Block<typename Kind::Element>& block,
                           int64_t panel) {
    using Element = typename Kind::Element;
    const auto* values = static_cast<const Element*>(args.values);
    const int64_t cuts = pieces(block.tiles, Kind::kRows);
    for (int64_t p = 0; p < kPoints; ++p) {
        const int64_t column = (panel * kPoints + p) * kPanel;
        for (int64_t cut = 0; cut < cuts; ++cut) {
            const int64_t t = cut * block.tiles / cuts, end = (cut + 1) * block.tiles / cuts;
            const Product<Element> product{block.inputs + p * block.point_stride + t * block.channels,
                                           values + column * block.channels,
                                           block.scales + p * block.tiles + t,
                                           Kind::kScaled ? args.scales + column : nullptr,
                                           block.products + (t * kPoints + p) * kPanel,
                                           block.channels};
            multiply<Kind, Kind::kRows>(product, end - t);
        }
    }
}

// A^T m A of the products m of one tile and panel, added to the bias and, if there is one, to a map.
// `pixels` are the output pixels, null outside the map, and `added` those of that map.
template <class T>
static void write_tile(const WinogradArgs& args, const float* products, const T* const* added, T* const* pixels,
                       int64_t panel) {
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const int64_t c = panel * kPanel + lane, count = args.out_channels - c;
        if (count <= 0) return;
        Vec m[kPoints], rows[kTile * kWindow], tile[kTile * kTile];
        for (int p = 0; p < kPoints; ++p) m[p] = load_lanes<kLanes>(products + p * kPanel + lane);
        NCSN_UNROLL
        for (int j = 0; j < kWindow; ++j) winograd_output(m + j, rows + j, kWindow);
        NCSN_UNROLL
        for (int i = 0; i < kTile; ++i) winograd_output(rows + i * kWindow, tile + i * kTile, 1);
        const Vec bias = args.bias == nullptr ? Vec{} : load_some(args.bias + c, count);
        for (int q = 0; q < kTile * kTile; ++q) {
            if (pixels[q] == nullptr) continue;
            Vec value = tile[q] + bias;
            if (args.added != nullptr) value += load_some(added[q] + c, count);
            store_some(pixels[q] + c, value, count);
        }
    }
}

// The `size` by `size` pixels, a dilation apart, from `from` in units of the dilation; `outside` for
// those that are not in the map.
template <int size, class T>
static inline void find_pixels(const WinogradArgs& args, const Corner& corner, int from, T* map,
                               int64_t channels, T* outside, T** pixels) {
    for (int i = 0; i < size; ++i) {
        const int64_t row = corner.row + (i + from) * args.dilation;
        for (int j = 0; j < size; ++j) {
            const int64_t column = corner.column + (j + from) * args.dilation;
            const bool inside = row >= 0 && row < args.height && column >= 0 && column < args.width;
            const int64_t at = (corner.sample * args.height + row) * args.width + column;
            pixels[i * size + j] = inside ? map + at * channels : outside;
        }
    }
}

template <class Kind, class T>
static void run_unit(const WinogradArgs& args, const WinogradPlan& plan,
                     const Block<typename Kind::Element>& block, int64_t group) {
    for (int64_t t = 0; t < block.tiles; ++t) {
        const T* pixels[kPoints];
        find_pixels<kWindow>(args, corner_of(args, plan, block.first + t), -1, static_cast<const T*>(args.x),
                             args.in_channels, static_cast<const T*>(block.zeros), pixels);
        transform_tile<Kind>(block, pixels, args.in_channels, t);
    }
    const int64_t end = (group + 1) * plan.sizes.panels / plan.groups;
    for (int64_t panel = group * plan.sizes.panels / plan.groups; panel < end; ++panel) {
        multiply_panel<Kind>(args, block, panel);
        for (int64_t t = 0; t < block.tiles; ++t) {
            T* pixels[kTile * kTile];
            const T* added[kTile * kTile];
            const Corner corner = corner_of(args, plan, block.first + t);
            find_pixels<kTile>(args, corner, 0, static_cast<T*>(args.out), args.out_row,
                               static_cast<T*>(nullptr), pixels);
            if (args.added != nullptr) {
                find_pixels<kTile>(args, corner, 0, static_cast<const T*>(args.added), args.out_channels,
                                   static_cast<const T*>(nullptr), added);
            }
            write_tile(args, block.products + t * kPoints * kPanel, added, pixels, panel);
        }
    }
}

template <class Kind, class T>
static void run(const WinogradArgs& args, const WinogradPlan& plan, const WinogradWorkspace& workspace) {
#pragma omp parallel for schedule(dynamic) num_threads(workspace.threads)
    for (int64_t unit = 0; unit < plan.blocks * plan.groups; ++unit) {
        const int64_t b = unit / plan.groups;
        const int64_t first = b * plan.tiles / plan.blocks, end = (b + 1) * plan.tiles / plan.blocks;
        unsigned char* const slot = workspace.data + omp_get_thread_num() * plan.slot_bytes;
        const Block<typename Kind::Element> block{
            reinterpret_cast<typename Kind::Element*>(slot + plan.inputs_at),
            reinterpret_cast<float*>(slot + plan.scales_at),
            reinterpret_cast<float*>(slot + plan.products_at),
            reinterpret_cast<float*>(slot + plan.unrounded_at),
            workspace.zeros,
            first,
            end - first,
            plan.sizes.channels,
            plan.point_stride};
        run_unit<Kind, T>(args, plan, block, unit % plan.groups);
    }
}

void winograd(const WinogradArgs& args, const WinogradPlan& plan, const WinogradWorkspace& workspace) {
    if (args.dtype == Dtype::kFloat32) return run<FloatingPoint, float>(args, plan, workspace);
#if defined(__AVX512BW__)
    if (plan.vnni == Vnni::kAvx512) return run<FixedPointVnni, Bfloat16>(args, plan, workspace);
#elif defined(__AVX2__)
    if (plan.vnni == Vnni::kAvx) return run<FixedPointVnni, Bfloat16>(args, plan, workspace);
    if (plan.vnni == Vnni::kAvx512Narrow) return run<FixedPointVnniNarrow, Bfloat16>(args, plan, workspace);
#endif
    run<FixedPoint, Bfloat16>(args, plan, workspace);
}

}  // namespace ncsn_fast::NCSN_ISA
