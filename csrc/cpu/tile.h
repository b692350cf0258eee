// The tile registers of Intel AMX, and the instructions of them that our kernels use: load, store, zero
// and TDPBF16PS. Where this file is compiled for AMX they are the processor's; everywhere else they are
// emulated in vectors, with the bits that Intel documents (Software Developer's Manual, volume 2,
// TDPBF16PS), so that every machine can test what a kernel for tiles computes. Only a NaN may be another
// one.
//
// All eight tiles are whole: 16 rows of 64 bytes.
#pragma once

#include "lanes.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int kTiles = 8, kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;
constexpr int kTileSums = kTileRowBytes / 4;   // float32s in a row
constexpr int kTileInputs = kTileRowBytes / 2;  // bfloat16s in a row

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

// In assembly, because the intrinsics take the number of a tile only as a literal.
class Tiles {
  public:
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < kTiles; ++i) config.row_bytes[i] = kTileRowBytes, config.rows[i] = kTileRows;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    // Without this the kernel would save the tiles at every switch of threads.
    ~Tiles() { asm volatile("tilerelease"); }

    template <int tile>
    void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(tile));
    }

    // Rows begin `stride` bytes apart.
    template <int tile>
    void load(const void* rows, int64_t stride) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(rows), "r"(stride) : "memory");
    }

    template <int tile>
    void store(void* rows, int64_t stride) const {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(rows), "r"(stride) : "memory");
    }

    // sum[m][n] += a[m] . b[., n] in float32: a is 16 rows of 32 bfloat16s; row k of b holds elements
    // 2 k and 2 k + 1 of each of 16 columns, side by side.
    template <int sum, int a, int b>
    void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
    }
};

#else

class Tiles {
  public:
    template <int tile>
    void zero() {
        memset(tiles_[tile], 0, kTileBytes);
    }

    template <int tile>
    void load(const void* rows, int64_t stride) {
        const auto* from = static_cast<const char*>(rows);
        for (int r = 0; r < kTileRows; ++r) memcpy(tiles_[tile][r], from + r * stride, kTileRowBytes);
    }

    template <int tile>
    void store(void* rows, int64_t stride) const {
        auto* to = static_cast<char*>(rows);
        for (int r = 0; r < kTileRows; ++r) memcpy(to + r * stride, tiles_[tile][r], kTileRowBytes);
    }

    // For each row: the even elements and the odd ones are summed on their own, by fused multiply-adds in
    // order; the two sums are added, and the total to the tile. Every result below 2^-126 becomes a zero
    // of its sign, and so does every such operand.
    template <int sum, int a, int b>
    void multiply() {
        Operand operand;
        for (int k = 0; k < kTileRows; ++k) {
            for (int i = 0; i < kParts; ++i) {
                const Bits word = load_bits<Bits>(tiles_[b][k] + i * kLanes);
                operand.even[k][i] = normal((Vec)(word << 16));
                operand.odd[k][i] = normal((Vec)(word & kHigh));
            }
        }
        for (int m = 0; m < kTileRows; ++m) multiply_row(tiles_[a][m], operand, tiles_[sum][m]);
    }

  private:
    typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

    static constexpr int kParts = kTileSums / kLanes;
    static constexpr uint32_t kHigh = 0xffff0000u, kSign = 0x80000000u, kSmallestNormal = 0x00800000u;

    struct Operand {
        Vec even[kTileRows][kParts], odd[kTileRows][kParts];
    };

    static Vec normal(Vec v) {
        const Bits bits = (Bits)v, magnitude = bits & ~kSign;
        return (Vec)(magnitude < kSmallestNormal ? bits & kSign : bits);
    }

    static float normal(float x) {
        const uint32_t bits = float_bits(x);
        return bits_float((bits & ~kSign) < kSmallestNormal ? bits & kSign : bits);
    }

    // `edge` gets the lanes whose result is +-2^-126: see multiply_exactly.
    static Vec multiply_normal(Vec x, Vec y, Vec sum, Bits& edge) {
        const Vec result = multiply_add(x, y, sum);
        edge |= (Bits)(((Bits)result & ~kSign) == kSmallestNormal);
        return normal(result);
    }

    // A result is tiny, and so becomes zero, if it is below 2^-126 when it is rounded to 24 bits with an
    // unbounded exponent. Numbers just below 2^-126 that are tiny in this sense are rounded up to it in
    // float32. The sum is exact in float64 there.
    static float multiply_exactly(float x, float y, float sum) {
        const float result = fused(x, y, sum);
        if ((float_bits(result) & ~kSign) == kSmallestNormal) {
            const double exact = static_cast<double>(x) * y + sum;
            const double magnitude = exact < 0.0 ? -exact : exact;
            if (magnitude < 0x1p-126 - 0x1p-151) return bits_float(float_bits(result) & kSign);
        }
        return normal(result);
    }

    static void multiply_row(const uint32_t* a, const Operand& b, uint32_t* sums) {
        Vec even[kParts] = {}, odd[kParts] = {};
        Bits edge{};
        for (int k = 0; k < kTileRows; ++k) {
            // Less zero, which keeps the sign of a zero.
            const Vec low = normal(bits_float(a[k] << 16)) - Vec{};
            const Vec high = normal(bits_float(a[k] & kHigh)) - Vec{};
            NCSN_UNROLL
            for (int i = 0; i < kParts; ++i) {
                even[i] = multiply_normal(low, b.even[k][i], even[i], edge);
                odd[i] = multiply_normal(high, b.odd[k][i], odd[i], edge);
            }
        }
        uint32_t at_edge[kLanes], any = 0;
        memcpy(at_edge, &edge, sizeof edge);
        for (int i = 0; i < kLanes; ++i) any |= at_edge[i];
        if (any != 0) multiply_row_exactly(a, b, even, odd);
        for (int i = 0; i < kParts; ++i) {
            const Vec before = normal(load_bits<Vec>(sums + i * kLanes));
            store_bits(sums + i * kLanes, normal(before + normal(even[i] + odd[i])));
        }
    }

    static void multiply_row_exactly(const uint32_t* a, const Operand& b, Vec* even, Vec* odd) {
        for (int i = 0; i < kParts; ++i) {
            for (int lane = 0; lane < kLanes; ++lane) {
                float first = 0.0f, second = 0.0f;
                for (int k = 0; k < kTileRows; ++k) {
                    first = multiply_exactly(normal(bits_float(a[k] << 16)), b.even[k][i][lane], first);
                    second = multiply_exactly(normal(bits_float(a[k] & kHigh)), b.odd[k][i][lane], second);
                }
                even[i][lane] = first, odd[i][lane] = second;
            }
        }
    }

    alignas(64) uint32_t tiles_[kTiles][kTileRows][kTileSums] = {};
};

#endif

}  // namespace ncsn_fast::NCSN_ISA
