// Chooses the kernels of a group normalisation; `launch(kernel, blocks)` runs them, on a GPU or emulated.
#pragma once

#include "group_norm_phases.h"
#include "norm_launch.h"

namespace ncsn_fast {

// partials: (batch, tiles, 2, channels); coefficients: (batch, 3, channels).
template <class Launch>
void launch_group_norm(const GroupNormArgs& args, float* partials, float* coefficients, Launch launch) {
    NormArgs maps{};
    maps.batch = args.batch, maps.channels = args.channels, maps.plane = args.plane;
    maps.x = args.x, maps.y = args.y, maps.in_dtype = args.in_dtype, maps.out_dtype = args.out_dtype;
    maps.channels_last = true;
    check_norm(maps, false);
    if (args.batch * args.channels * args.plane == 0) return;
    const Tiling split = Tiling::of(args.channels, args.plane, args.in_dtype);
    launch_statistics(maps, split, partials, launch);
    launch(GroupCoefficients{args, maps, partials, coefficients, split.rows, split.tiles},
           args.batch * args.groups);
    with_accesses(maps, [&]<class In, class Out>(In, Out) {
        with_curve(args.activation, [&]<class Curve>(Curve) {
            const GroupApply<In, Out, Curve> apply(maps, args.activation, coefficients);
            launch(apply, apply.blocks());
        });
    });
}

}  // namespace ncsn_fast
