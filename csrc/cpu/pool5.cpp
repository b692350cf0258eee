// 5x5 pools on the CPU; the equations are in ncsn_fast/pool5.h. Separable: each input row is pooled
// along the width in registers, into a ring of five rows that stays in the first-level cache; each
// output row joins the five. One read and one write of memory an element, plus the rims of tiles.
//
// A unit of work is a tile of a sample: some channels, columns and rows. Sums have one order,
// ((0 + 1) + (2 + 3)) + 4, so no tile can change a result.
#include "lanes.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int64_t kTileWidth = 16;   // a ring of 20 KiB at 64 bytes a register
constexpr int64_t kTileHeight = 64;  // the rim costs 4 rows of pooling along the width
constexpr int64_t kTileBytes = 256;  // of neighbouring channels: long enough to be fetched ahead
constexpr int kVectors = 4;          // vectors of channels at a time; 15 % faster than one

// The two kinds of pool on n channels of type T. `kWidest` is the n of a whole register.
template <class T, int n>
struct Maximum {
    using Order = PoolOrder<T>;
    using Value = Lanes<typename Order::Key, n>;
    static constexpr int kLanesOf = n, kWidest = kLanes * sizeof(float) / sizeof(T);

    static Value flipped(Value bits) { return bits ^ ((bits >> Order::kSignBit) & Order::kMagnitude); }

    static Value outside() { return Value{} + static_cast<typename Order::Key>(~Order::kMagnitude); }

    static Value load(const T* p) {
        using Bits = Lanes<typename Order::Bits, n>;
        return (Value)((Bits)flipped(load_bits<Value>(p)) - Order::kNegativeNans);
    }

    static Value join(Value a, Value b) { return a > b ? a : b; }

    static void store(T* p, Value key) {
        using Bits = Lanes<typename Order::Bits, n>;
        store_bits(p, flipped((Value)((Bits)key + Order::kNegativeNans)));
    }
};

template <class T, int n>
struct Average {
    using Value = Lanes<float, n>;
    static constexpr int kLanesOf = n, kWidest = kLanes;

    static Value outside() { return Value{}; }
    static Value load(const T* p) { return load_lanes<n>(p); }
    static Value join(Value a, Value b) { return a + b; }
    static void store(T* p, Value sum) { store_lanes<n>(p, sum * kPoolShare); }
};

struct Tile {
    int64_t sample, channel, last_channel, left, right, top, bottom;
};

// `count` vectors of neighbouring channels at one position.
template <class Op, int count>
struct Group {
    typename Op::Value v[count];
};

template <class Op, int count>
static inline Group<Op, count> joined(const Group<Op, count>& a, const Group<Op, count>& b) {
    Group<Op, count> out;
    NCSN_UNROLL
    for (int k = 0; k < count; ++k) out.v[k] = Op::join(a.v[k], b.v[k]);
    return out;
}

// Pools positions [left, right) of a row of `width` positions, `stride` elements apart.
template <class Op, int count, class T>
static inline void pool_row(const T* row, int64_t stride, int64_t width, int64_t left, int64_t right,
                            Group<Op, count>* out) {
    const auto at = [&](int64_t w) {
        Group<Op, count> out;
        const bool inside = w >= 0 && w < width;
        NCSN_UNROLL
        for (int k = 0; k < count; ++k) {
            out.v[k] = inside ? Op::load(row + w * stride + k * Op::kLanesOf) : Op::outside();
        }
        return out;
    };
    // Pairs serve twice: those that start at w - 2, w - 1 and w.
    auto last = at(left + 1);
    auto pair0 = joined(at(left - 2), at(left - 1)), pair1 = joined(at(left - 1), at(left));
    auto pair2 = joined(at(left), last);
    for (int64_t w = left; w < right; ++w) {
        const auto next = at(w + 2);
        *out++ = joined(joined(pair0, pair2), next);
        pair0 = pair1, pair1 = pair2, pair2 = joined(last, next), last = next;
    }
}

// A tile of `count` vectors of channels from channel c.
template <class Op, int count, class T>
static void pool_block(const PoolArgs& args, const Tile& tile, int64_t c) {
    Group<Op, count> ring[kPoolSize][kTileWidth];
    const int64_t line = args.width * args.channels, start = tile.sample * args.height * line + c;
    const T* x = static_cast<const T*>(args.x) + start;
    const PixelLayout& to = args.y_pixels;
    T* y = static_cast<T*>(args.y) + tile.sample * to.image + tile.left * to.pixel + c;
    const int64_t width = tile.right - tile.left;
    for (int64_t r = tile.top - kPoolPadding; r < tile.bottom + kPoolPadding; ++r) {
        auto* const newest = ring[(r + kPoolSize) % kPoolSize];
        if (r >= 0 && r < args.height) {
            pool_row(x + r * line, args.channels, args.width, tile.left, tile.right, newest);
        } else {
            for (int64_t w = 0; w < width; ++w) {
                for (int k = 0; k < count; ++k) newest[w].v[k] = Op::outside();
            }
        }
        if (r < tile.top + kPoolPadding) continue;
        const auto row = [&](int age) { return ring[(r + kPoolSize - age) % kPoolSize]; };
        const auto *r0 = row(4), *r1 = row(3), *r2 = row(2), *r3 = row(1);
        T* out = y + (r - kPoolPadding) * to.row;
        for (int64_t w = 0; w < width; ++w, out += to.pixel) {
            const auto all = joined(joined(joined(r0[w], r1[w]), joined(r2[w], r3[w])), newest[w]);
            NCSN_UNROLL
            for (int k = 0; k < count; ++k) Op::store(out + k * Op::kLanesOf, all.v[k]);
        }
    }
}

// Channels of a tile from c: `count` vectors of n at a time, then fewer, then smaller ones.
template <template <class, int> class Op, class T, int n, int count>
static void pool_tile(const PoolArgs& args, const Tile& tile, int64_t c) {
    for (; c + count * n <= tile.last_channel; c += count * n) {
        pool_block<Op<T, n>, count, T>(args, tile, c);
    }
    if (c == tile.last_channel) return;
    if constexpr (count > 1) {
        pool_tile<Op, T, n, count / 2>(args, tile, c);
    } else if constexpr (n > 1) {
        pool_tile<Op, T, n / 2, 1>(args, tile, c);
    }
}

template <template <class, int> class Op, class T>
static void run(const PoolArgs& args, int threads) {
    constexpr int64_t kTileChannels = kTileBytes / sizeof(T);
    const int64_t across = pieces(args.channels, kTileChannels), along = pieces(args.width, kTileWidth);
    const int64_t down = pieces(args.height, kTileHeight);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < args.batch * down * along * across; ++t) {
        const int64_t channel = t % across * kTileChannels, left = t / across % along * kTileWidth;
        const int64_t top = t / across / along % down * kTileHeight;
        const Tile tile{t / across / along / down,
                        channel,
                        smaller(channel + kTileChannels, args.channels),
                        left,
                        smaller(left + kTileWidth, args.width),
                        top,
                        smaller(top + kTileHeight, args.height)};
        pool_tile<Op, T, Op<T, 1>::kWidest, kVectors>(args, tile, channel);
    }
}

void pool5(PoolKind kind, const PoolArgs& args, int threads) {
    const bool wide = args.dtype == Dtype::kFloat32;
    const auto chosen = kind == PoolKind::kMax ? (wide ? run<Maximum, float> : run<Maximum, Bfloat16>)
                                               : (wide ? run<Average, float> : run<Average, Bfloat16>);
    chosen(args, threads);
}

}  // namespace ncsn_fast::NCSN_ISA
