// Softmax attention of each sample and head (Vaswani et al. 2017):
//
//   out_i = sum_j p_ij v_j,   p_ij = exp(s_ij) / sum_k exp(s_ik),   s_ij = scale q_i . k_j
#pragma once

#include "ncsn_fast/dtypes.h"
#include "ncsn_fast/elementary.h"

namespace ncsn_fast {

constexpr int64_t kAttentionPanel = 32;  // columns of a packed matrix, at every instruction-set level
constexpr int64_t kAttentionRows = 14;   // queries at a time, at most

// Tokens of all samples lie one after another, `row` elements apart; a head begins `head` elements after
// the one before it. So q, k and v may be parts of one map of their channels.
struct Tokens {
    int64_t row, head;
};

struct AttentionArgs {
    int64_t batch, heads, queries, keys;  // tokens of a sample in q and out; in k and v
    int64_t width, value_width;           // elements of a head in q and k; in v and out
    const void *q, *k, *v;
    void* out;  // not q, k or v
    Tokens q_tokens, k_tokens, v_tokens, out_tokens;
    float scale;
    Dtype dtype;
};

}  // namespace ncsn_fast
