// Softmax attention on the CPU; the equation is in ncsn_fast/attention.h. Bound by arithmetic: two matrix
// products in float32, and an exponential for each pair of tokens.
//
// A unit of work is a sample, a head and some of its queries. Keys and values are packed into panels once
// per unit; then a few queries at a time have their scores, the softmax and the weighted sum, which stay
// in cache. Sums run over elements, and over keys, in order: no bit depends on threads or blocks.
#include <omp.h>

#include "exponentiate.h"
#include "lanes.h"
#include "ncsn_fast/attention.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int kPanel = kAttentionPanel;
constexpr int kRegisters = 2;                 // vectors of columns in a product
constexpr int kRows = kLanes == 16 ? 14 : 6;  // rows in a product: the sums fill the registers

// c = a b, for a (rows, depth), its rows `a_row` apart, and a panel b (depth, kPanel). Not inlined: the
// sums then stay in registers.
template <int rows>
static __attribute__((noinline)) void multiply_rows(const float* a, int64_t a_row, const float* b,
                                                    int64_t depth, float* c, int64_t c_row) {
    for (int part = 0; part < kPanel; part += kRegisters * kLanes) {
        Vec sum[rows][kRegisters];
        NCSN_UNROLL
        for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = Vec{};
        const float *column = b + part, *row = a;
        for (const float* end = row + depth; row != end; ++row, column += kPanel) {
            const Vec low = load_lanes<kLanes>(column), high = load_lanes<kLanes>(column + kLanes);
            NCSN_UNROLL
            for (int r = 0; r < rows; ++r) {
                const Vec x = Vec{} + row[r * a_row];
                sum[r][0] = multiply_add(low, x, sum[r][0]);
                sum[r][1] = multiply_add(high, x, sum[r][1]);
            }
        }
        NCSN_UNROLL
        for (int r = 0; r < rows; ++r) {
            store_lanes<kLanes>(c + r * c_row + part, sum[r][0]);
            store_lanes<kLanes>(c + r * c_row + part + kLanes, sum[r][1]);
        }
    }
}

template <int rows>
static inline void multiply_panel(const float* a, int64_t a_row, int64_t count, const float* b,
                                  int64_t depth, float* c, int64_t c_row) {
    if constexpr (rows > 1) {
        if (count < rows) return multiply_panel<rows - 1>(a, a_row, count, b, depth, c, c_row);
    }
    multiply_rows<rows>(a, a_row, b, depth, c, c_row);
}

// c (count, columns) = a b for b in panels; count is at most kRows, columns a multiple of kPanel.
static void multiply(const float* a, int64_t a_row, int64_t count, const float* b, int64_t depth, float* c,
                     int64_t columns) {
    for (int64_t j = 0; j < columns; j += kPanel) {
        multiply_panel<kRows>(a, a_row, count, b + j * depth, depth, c + j, columns);
    }
}

// Rows of `width` elements as panels of their transpose: (width, kPanel) of kPanel rows each.
template <class T>
static void pack_transposed(const T* from, int64_t rows, int64_t row, int64_t width, float* out) {
    for (int64_t first = 0; first < rows; first += kPanel, out += width * kPanel) {
        const int64_t count = smaller(kPanel, rows - first);
        for (int64_t j = 0; j < kPanel; ++j) {
            for (int64_t i = 0; i < width; ++i) {
                out[i * kPanel + j] = j < count ? to_float(from[(first + j) * row + i]) : 0.0f;
            }
        }
    }
}

// Rows of `width` elements as panels: (rows, kPanel) of kPanel columns each.
template <class T>
static void pack(const T* from, int64_t rows, int64_t row, int64_t width, float* out) {
    for (int64_t first = 0; first < width; first += kPanel, out += rows * kPanel) {
        const int64_t count = smaller(kPanel, width - first);
        for (int64_t r = 0; r < rows; ++r) {
            float* const to = out + r * kPanel;
            const T* const x = from + r * row + first;
            for (int64_t i = 0; i < kPanel; ++i) to[i] = i < count ? to_float(x[i]) : 0.0f;
        }
    }
}

// Queries first .. first + count - 1 of a sample and head; q and out are its first ones.
template <class T>
static void attend(const AttentionArgs& args, const AttentionPlan& plan, const T* q, T* out, float* slot,
                   int64_t first, int64_t count) {
    float *queries = slot + plan.queries_at, *scores = slot + plan.scores_at, *sums = slot + plan.sums_at;
    for (int64_t r = 0; r < count; ++r) {
        const T* from = q + (first + r) * args.q_tokens.row;
        float* const to = queries + r * args.width;
        for (int64_t i = 0; i < args.width; ++i) to[i] = to_float(from[i]) * args.scale;
    }
    multiply(queries, args.width, count, slot, args.width, scores, plan.padded_keys);
    float weight[kRows];
    for (int64_t r = 0; r < count; ++r) {
        weight[r] = 1.0f / exponentiate(scores + r * plan.padded_keys, args.keys, plan.padded_keys);
    }
    multiply(scores, plan.padded_keys, count, slot + plan.values_at, args.keys, sums, plan.padded_width);
    for (int64_t r = 0; r < count; ++r) {
        T* const to = out + (first + r) * args.out_tokens.row;
        const float* const sum = sums + r * plan.padded_width;
        for (int64_t i = 0; i < args.value_width; ++i) store(to + i, sum[i] * weight[r]);
    }
}

template <class T>
static const T* head_of(const void* tokens, Tokens layout, int64_t token, int64_t head) {
    return static_cast<const T*>(tokens) + token * layout.row + head * layout.head;
}

template <class T>
static void run(const AttentionArgs& args, const AttentionPlan& plan, const AttentionWorkspace& workspace) {
    const int64_t units = args.batch * args.heads * plan.parts;
#pragma omp parallel for schedule(static) num_threads(workspace.threads)
    for (int64_t unit = 0; unit < units; ++unit) {
        float* const slot = workspace.data + omp_get_thread_num() * plan.slot_floats;
        const int64_t part = unit % plan.parts, head = unit / plan.parts % args.heads;
        const int64_t sample = unit / plan.parts / args.heads;
        const int64_t query = sample * args.queries, key = sample * args.keys;
        pack_transposed(head_of<T>(args.k, args.k_tokens, key, head), args.keys, args.k_tokens.row, args.width,
                        slot);
        pack(head_of<T>(args.v, args.v_tokens, key, head), args.keys, args.v_tokens.row, args.value_width,
             slot + plan.values_at);
        const T* q = head_of<T>(args.q, args.q_tokens, query, head);
        T* out = const_cast<T*>(head_of<T>(args.out, args.out_tokens, query, head));
        const int64_t end = (part + 1) * args.queries / plan.parts;
        for (int64_t i = part * args.queries / plan.parts; i < end; i += kRows) {
            attend(args, plan, q, out, slot, i, smaller(kRows, end - i));
        }
    }
}

void attention(const AttentionArgs& args, const AttentionPlan& plan, const AttentionWorkspace& workspace) {
    (args.dtype == Dtype::kFloat32 ? run<float> : run<Bfloat16>)(args, plan, workspace);
}

}  // namespace ncsn_fast::NCSN_ISA
