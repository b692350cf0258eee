// Chooses the kernels of an instance normalisation++; `launch(kernel, blocks)` runs them, on a GPU or
// emulated.
#pragma once

#include "norm_phases.h"

namespace ncsn_fast {

inline void check_norm(const NormArgs& args, bool single) {
    if (args.plane > 0x7fffffffll || args.channels > 0x7fffffffll) {
        throw std::invalid_argument("maps must have fewer than 2**31 pixels and channels; got " +
                                    std::to_string(args.plane) + " and " + std::to_string(args.channels));
    }
    if (single && args.channels > kSingleChannels) {
        throw std::invalid_argument("one launch serves at most " + std::to_string(kSingleChannels) +
                                    " channels; got " + std::to_string(args.channels) + ". Use two.");
    }
    // Statistics read x in 16 bytes wherever its own pixels are whole ones, whatever y is.
    const auto fits = [&](const void* map, Dtype dtype) {
        return args.channels * element_size(dtype) % 16 != 0 || aligned(map, 16);
    };
    if (!fits(args.x, args.in_dtype) || !fits(args.y, args.out_dtype)) {
        throw std::invalid_argument("x and y must begin at multiples of 16 bytes; copy them with .clone()");
    }
}

// Calls run(In{}, Out{}) with accesses of 16 bytes of the narrower type, or of one element.
template <class In, class Run>
void with_output(const NormArgs& args, Run run) {
    if (args.out_dtype == Dtype::kBfloat16) {
        run(Access<In, 8>{}, Access<Bfloat16, 8>{});
    } else if (args.out_dtype == Dtype::kFloat16) {
        run(Access<In, 8>{}, Access<Float16, 8>{});
    } else {
        constexpr int kWidth = sizeof(In) == sizeof(float) ? 4 : 8;
        run(Access<In, kWidth>{}, Access<float, kWidth>{});
    }
}

template <class Run>
void with_accesses(const NormArgs& args, Run run) {
    const int narrow = std::min(element_size(args.in_dtype), element_size(args.out_dtype));
    if (args.channels % (16 / narrow) != 0) {
        run(AnyAccess{}, AnyAccess{});
    } else if (args.in_dtype == Dtype::kFloat32) {
        with_output<float>(args, run);
    } else if (args.in_dtype == Dtype::kBfloat16) {
        with_output<Bfloat16>(args, run);
    } else {
        with_output<Float16>(args, run);
    }
}

template <class Launch>
void launch_statistics(const NormArgs& args, const Tiling& split, float* partials, Launch launch) {
    const int64_t blocks = args.batch * split.tiles * split.lanes.column_blocks;
    const auto run = [&]<class In>(In) { launch(Statistics<In>{args, split, partials}, blocks); };
    if (args.channels % (16 / element_size(args.in_dtype)) != 0) {
        run(AnyAccess{});
    } else if (args.in_dtype == Dtype::kFloat32) {
        run(Access<float, 4>{});
    } else if (args.in_dtype == Dtype::kBfloat16) {
        run(Access<Bfloat16, 8>{});
    } else {
        run(Access<Float16, 8>{});
    }
}

// partials: (batch, tiles, 2, channels) where single is false.
template <class Launch>
void launch_norm(const NormArgs& args, float* partials, bool single, Launch launch) {
    check_norm(args, single);
    if (args.batch * args.channels * args.plane == 0) return;
    if (single) {
        with_accesses(args, [&]<class In, class Out>(In, Out) { launch(Single<In, Out>(args), args.batch); });
        return;
    }
    const Tiling split = Tiling::of(args.channels, args.plane, args.in_dtype);
    launch_statistics(args, split, partials, launch);
    with_accesses(args, [&]<class In, class Out>(In, Out) {
        const Apply<In, Out> apply(args, partials, split);
        launch(apply, apply.blocks());
    });
}

}  // namespace ncsn_fast
