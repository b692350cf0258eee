// One row of a sampler table on a GPU: state, history, noise, known pixels and the network's next input
// in one pass. The equation is in ncsn_fast/sampler_update.h.
//
// A thread does a quadruple of elements, which is what one Philox call serves (`UpdateQuads`), or, where
// the network's maps are channels-last with pixels of whole 16 bytes, four pixels of up to four channels
// (`UpdatePixels`). 3 channels padded to 8 in bfloat16 take 19 bytes an element (x twice, f and the next
// input 16 bytes a pixel), history 8 more, a mask with its values 5. Bound by memory.
#pragma once

#include "ncsn_fast/normal.h"
#include "ncsn_fast/philox.h"
#include "phases.h"
#include "update_loads.h"

namespace ncsn_fast {

constexpr int kUpdateThreads = 256;
constexpr int kPixelChannels = 4;  // of `UpdatePixels`; all lie in the first 16 bytes of a pixel

NCSN_HD Quad normal_quad(const Keys& keys, const Place& at, uint32_t stream, uint32_t step) {
    const NoiseKey key{keys.seed, keys.sample, stream, step};
    const Words w = noise_words(key, static_cast<uint32_t>(at.first / 4));
    const NormalPair low = box_muller(w.w0, w.w1), high = box_muller(w.w2, w.w3);
    return {low.first, low.second, high.first, high.second};
}

NCSN_HD Quad row_noise(const UpdateArgs& args, const Row& row, const Keys& keys, const Place& at) {
    Quad z = normal_quad(keys, at, kSamplerStream, row.step);
    if (args.noise_weights == nullptr) return z;
    const Quad second = normal_quad(keys, at, kSecondStream, row.step);
    for (int i = 0; i < 4; ++i) z.v[i] = fused(keys.weights[1], second.v[i], keys.weights[0] * z.v[i]);
    return z;
}

NCSN_HD void impose_known(const Row& row, const Keys& keys, const Place& at, const Inputs& in, Quad& x) {
    const Quad z = row.c_ref != 0.0f ? normal_quad(keys, at, kReferenceStream, row.ref_step) : Quad{};
    NCSN_UNROLL
    for (int i = 0; i < 4; ++i) {
        if ((in.mask >> 8 * i & 0xffu) != 0) x.v[i] = fused(row.c_ref, z.v[i], in.known.v[i]);
    }
}

// Computes the new state of four elements and stores it, with the history.
template <bool wide, bool history, bool masked>
NCSN_HD Quad next_state(const UpdateArgs& args, const Row& row, const Keys& keys, const Place& at,
                        const Inputs& in, const Quad& f) {
    Quad next;
    for (int i = 0; i < 4; ++i) next.v[i] = updated_state(row, in.x.v[i], f.v[i]);
    if (history && args.h != nullptr) {
        Quad h;
        for (int i = 0; i < 4; ++i) {
            next.v[i] = fused(row.g, in.h.v[i], next.v[i]);
            h.v[i] = updated_history(row, in.x.v[i], f.v[i]);
        }
        store_quad<wide>(args.h, at, h);
    }
    if (row.c != 0.0f) {
        const Quad z = row_noise(args, row, keys, at);
        for (int i = 0; i < 4; ++i) next.v[i] = fused(row.c, z.v[i], next.v[i]);
    }
    if (masked && args.mask != nullptr && row.c_ref == row.c_ref) impose_known(row, keys, at, in, next);
    store_quad<wide>(args.x, at, next);
    bool bad = false;
    for (int i = 0; i < 4; ++i) bad = bad || (i < at.count && is_nonfinite(next.v[i]));
    if (bad && args.nonfinite != nullptr) args.nonfinite[at.sample] = 1;  // all writers write 1
    return next;
}

// Four neighbouring elements of a map of a type known at run time.
NCSN_HD Quad load_four(Dtype dtype, const void* base, int64_t i) {
    Quad out{};
    const auto run = [&]<class A>(A) {
        const auto raw = A::load(dtype, base, i);
        for (int k = 0; k < 4; ++k) out.v[k] = A::value(raw, k);
    };
    if (dtype == Dtype::kFloat32) run(Access<float, 4>{});
    if (dtype == Dtype::kBfloat16) run(Access<Bfloat16, 4>{});
    if (dtype == Dtype::kFloat16) run(Access<Float16, 4>{});
    return out;
}

// 16-bit types are written `n` at a time, 4 or 8; zeros follow the four.
template <int n>
NCSN_HD void store_four(Dtype dtype, void* base, int64_t i, const Quad& q) {
    const float values[8] = {q.v[0], q.v[1], q.v[2], q.v[3]};
    if (dtype == Dtype::kFloat32) Access<float, 4>::store(dtype, base, i, values);
    if (dtype == Dtype::kBfloat16) Access<Bfloat16, n>::store(dtype, base, i, values);
    if (dtype == Dtype::kFloat16) Access<Float16, n>::store(dtype, base, i, values);
}

// For any shape and layout. wide: x, h and `known` are accessed 16 bytes at a time, the mask 4.
template <bool wide>
struct UpdateQuads {
    static constexpr int kThreads = kUpdateThreads, kPhases = 1;
    using Shared = NoShared;

    UpdateArgs args;
    int64_t quads;           // of a sample
    bool f_wide, net_wide;  // whether those maps are in order and aligned

    NCSN_HD_MEMBER Quad load_output(const Place& at) const {
        const MapLayout& layout = args.f_layout;
        const int64_t base = at.sample * layout.sample;
        if (wide && f_wide) return load_four(layout.dtype, args.f, base + at.first);
        Quad out{};
        NCSN_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i >= at.count) continue;
            out.v[i] = load_as(layout.dtype, args.f, base + offset_of(at.first + i, args.plane, layout));
        }
        return out;
    }

    NCSN_HD_MEMBER void store_input(const Row& row, const Place& at, const Quad& x) const {
        const MapLayout& layout = args.net_layout;
        const int64_t base = at.sample * layout.sample;
        Quad next;
        for (int i = 0; i < 4; ++i) next.v[i] = network_input(row, x.v[i]);
        if (wide && net_wide) return store_four<4>(layout.dtype, args.net_input, base + at.first, next);
        NCSN_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i >= at.count) continue;
            const int64_t offset = base + offset_of(at.first + i, args.plane, layout);
            store_as(layout.dtype, args.net_input, offset, next.v[i]);
            if (at.first + i >= args.plane) continue;  // the first channel fills what the state lacks
            for (int64_t c = args.channels; c < layout.channels; ++c) {
                store_as(layout.dtype, args.net_input, offset + c * layout.channel, 0.0f);
            }
        }
    }

    NCSN_HD_MEMBER void run(Phase<0>, int64_t block, int thread, Shared&) const {
        const int64_t index = block * kThreads + thread;
        if (index >= args.batch * quads) return;
        const int64_t numel = args.channels * args.plane;
        const int64_t sample = index / quads, first = index % quads * 4, left = numel - first;
        const Place at{sample, first, sample * numel + first, static_cast<int>(left < 4 ? left : 4)};
        const Inputs in = load_inputs<wide, true, true>(args, at);
        const Keys keys = load_keys(args, sample);
        const int64_t counter = load_counter(args);
        const Quad f = load_output(at);
        Row row;
        if (!read_row(args, counter, row)) return;
        const Quad next = next_state<wide, true, true>(args, row, keys, at, in, f);
        if (args.net_input != nullptr) store_input(row, at, next);
    }
};

// For up to four channels, H W a multiple of 4, and maps whose pixels are a multiple of 16 bytes.
template <bool history, bool masked>
struct UpdatePixels {
    static constexpr int kThreads = kUpdateThreads, kPhases = 1, kResident = masked ? 512 : 768;
    using Shared = NoShared;
    using Raw = Access<float, 4>::Raw;

    UpdateArgs args;

    NCSN_HD_MEMBER Place place(int64_t sample, int64_t first, int channel) const {
        const int64_t element = channel * args.plane + first;
        return {sample, element, sample * args.channels * args.plane + element, 4};
    }

    // The first 16 bytes of each of four pixels, of any dtype: converted after all loads are issued.
    NCSN_HD_MEMBER void load_pixels(int64_t at, Raw (&raw)[4]) const {
        const int64_t words = args.f_layout.dtype == Dtype::kFloat32 ? 2 : 1;
        NCSN_UNROLL
        for (int i = 0; i < 4; ++i, at += args.f_layout.pixel) {
            load_words<4>(static_cast<const uint16_t*>(args.f) + words * at, raw[i].word);
        }
    }

    template <class A>
    NCSN_HD_MEMBER void unpack(const Raw (&raw)[4], Quad (&pixel)[4]) const {
        NCSN_UNROLL
        for (int i = 0; i < 4; ++i) {
            typename A::Raw own;
            for (int k = 0; k < 4; ++k) own.word[k] = raw[i].word[k];
            for (int c = 0; c < 4; ++c) pixel[i].v[c] = A::value(own, c);
        }
    }

    NCSN_HD_MEMBER void run(Phase<0>, int64_t block, int thread, Shared&) const {
        const int64_t groups = args.plane / 4, index = block * kThreads + thread;
        if (index >= args.batch * groups) return;
        const int64_t sample = index / groups, first = index % groups * 4;
        const MapLayout &from = args.f_layout, &to = args.net_layout;
        const Keys keys = load_keys(args, sample);
        Raw raw[4];
        load_pixels(sample * from.sample + first * from.pixel, raw);
        Inputs in[kPixelChannels] = {};
        NCSN_UNROLL
        for (int c = 0; c < kPixelChannels; ++c) {
            if (c < args.channels) in[c] = load_inputs<true, history, masked>(args, place(sample, first, c));
        }
        Row row;
        if (!read_row(args, load_counter(args), row)) return;
        Quad pixel[4] = {};
        if (from.dtype == Dtype::kFloat32) unpack<Access<float, 4>>(raw, pixel);
        if (from.dtype == Dtype::kBfloat16) unpack<Access<Bfloat16, 8>>(raw, pixel);
        if (from.dtype == Dtype::kFloat16) unpack<Access<Float16, 8>>(raw, pixel);
        NCSN_UNROLL
        for (int c = 0; c < kPixelChannels; ++c) {
            Quad x{};
            if (c < args.channels) {
                const Quad f{pixel[0].v[c], pixel[1].v[c], pixel[2].v[c], pixel[3].v[c]};
                x = next_state<true, history, masked>(args, row, keys, place(sample, first, c), in[c], f);
                for (int i = 0; i < 4; ++i) x.v[i] = network_input(row, x.v[i]);
            }
            NCSN_UNROLL
            for (int i = 0; i < 4; ++i) pixel[i].v[c] = x.v[i];
        }
        if (args.net_input != nullptr) store_pixels(sample * to.sample + first * to.pixel, pixel);
    }

    NCSN_HD_MEMBER void store_pixels(int64_t at, const Quad (&pixel)[4]) const {
        const MapLayout& to = args.net_layout;
        const int in_16_bytes = to.dtype == Dtype::kFloat32 ? 4 : 8;
        NCSN_UNROLL
        for (int i = 0; i < 4; ++i, at += to.pixel) {
            store_four<8>(to.dtype, args.net_input, at, pixel[i]);
            for (int64_t c = in_16_bytes; c < to.channels; c += in_16_bytes) {
                store_four<8>(to.dtype, args.net_input, at + c, Quad{});
            }
        }
    }
};

inline bool whole_pixels(const void* base, const MapLayout& layout) {
    const int64_t size = layout.dtype == Dtype::kFloat32 ? 4 : 2;
    return layout.channel == 1 && layout.pixel == layout.channels && layout.pixel * size % 16 == 0 &&
           layout.sample * size % 16 == 0 && aligned(base, 16);
}

inline bool whole_quads(const void* base, const MapLayout& layout, const UpdateArgs& args) {
    return in_order(layout, args.channels, args.plane) && layout.channels == args.channels &&
           layout.sample % 4 == 0 && aligned(base, 16);
}

template <bool value>
struct Flag {};

template <class Run>
void with_terms(const UpdateArgs& args, Run run) {
    if (args.mask != nullptr) return run(Flag<true>{}, Flag<true>{});
    if (args.h != nullptr) return run(Flag<true>{}, Flag<false>{});
    run(Flag<false>{}, Flag<false>{});
}

// Selects the kernel; `launch(kernel, blocks)` runs it, on a GPU or emulated.
template <class Launch>
void launch_update(const UpdateArgs& args, Launch launch) {
    const int64_t numel = args.channels * args.plane;
    if (args.batch * numel == 0) return;
    const auto blocks = [&](int64_t threads) {
        return (args.batch * threads + kUpdateThreads - 1) / kUpdateThreads;
    };
    const bool wide = numel % 4 == 0 && aligned(args.x, 16) && aligned(args.h, 16) &&
                      aligned(args.known, 16) && aligned(args.mask, 4);
    const bool net_pixels = args.net_input == nullptr || whole_pixels(args.net_input, args.net_layout);
    if (wide && args.plane % 4 == 0 && args.channels <= kPixelChannels && net_pixels &&
        whole_pixels(args.f, args.f_layout)) {
        return with_terms(args, [&]<bool history, bool masked>(Flag<history>, Flag<masked>) {
            launch(UpdatePixels<history, masked>{args}, blocks(args.plane / 4));
        });
    }
    const int64_t quads = (numel + 3) / 4;
    const bool f_wide = whole_quads(args.f, args.f_layout, args);
    const bool net_wide = whole_quads(args.net_input, args.net_layout, args);
    if (wide) {
        launch(UpdateQuads<true>{args, quads, f_wide, net_wide}, blocks(quads));
    } else {
        launch(UpdateQuads<false>{args, quads, false, false}, blocks(quads));
    }
}

}  // namespace ncsn_fast
