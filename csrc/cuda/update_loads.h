// Loads that a thread of the sampler update issues before it reads the row. The row takes two dependent
// reads, which overlap with the loads of state, history, known pixels and noise keys.
#pragma once

#include "access.h"
#include "ncsn_fast/sampler_update.h"

namespace ncsn_fast {

struct Quad {
    float v[4];
};

// A thread's elements: [first, first + count) of `sample`, at `base` in its contiguous tensors.
struct Place {
    int64_t sample, first, base;
    int count;
};

template <bool wide>
NCSN_HD Quad load_quad(const float* p, const Place& at) {
    Quad out{};
    if constexpr (wide) {
        const auto raw = Access<float, 4>::load(Dtype::kFloat32, p, at.base);
        for (int i = 0; i < 4; ++i) out.v[i] = Access<float, 4>::value(raw, i);
    } else {
        NCSN_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i < at.count) out.v[i] = bits_float(load_word(p + at.base + i));
        }
    }
    return out;
}

// Noise key and weights of a sample.
struct Keys {
    uint32_t seed, sample;
    float weights[2];
};

NCSN_HD Keys load_keys(const UpdateArgs& args, int64_t sample) {
    Keys keys{args.seed, load_word(args.samples + sample), {}};  // the low words of those below 2^32
    if (args.seeds != nullptr) keys.seed = load_word(args.seeds + sample);
    if (args.noise_weights != nullptr) {
        const float* from = args.noise_weights + 2 * sample;
        for (int i = 0; i < 2; ++i) keys.weights[i] = bits_float(load_word(from + i));
    }
    return keys;
}

// State of four neighbouring elements.
struct Inputs {
    Quad x, h, known;
    uint32_t mask;  // a byte an element
};

// history, masked: whether there may be a history, or a mask.
template <bool wide, bool history, bool masked>
NCSN_HD Inputs load_inputs(const UpdateArgs& args, const Place& at) {
    Inputs in{};
    in.x = load_quad<wide>(args.x, at);
    if (history && args.h != nullptr) in.h = load_quad<wide>(args.h, at);
    if (!masked || args.mask == nullptr) return in;
    in.known = load_quad<wide>(args.known, at);
    if constexpr (wide) {
        in.mask = load_word(args.mask + at.base);
    } else {
        for (int i = 0; i < at.count; ++i) in.mask |= static_cast<uint32_t>(args.mask[at.base + i]) << 8 * i;
    }
    return in;
}

NCSN_HD int64_t load_counter(const UpdateArgs& args) {
    return args.rows.table == nullptr ? 0 : static_cast<int32_t>(load_word(args.rows.counter));
}

template <bool wide>
NCSN_HD void store_quad(float* p, const Place& at, const Quad& q) {
    if constexpr (wide) {
        Access<float, 4>::store(Dtype::kFloat32, p, at.base, q.v);
    } else {
        NCSN_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i < at.count) p[at.base + i] = q.v[i];
        }
    }
}

}  // namespace ncsn_fast
