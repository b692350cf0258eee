// Group normalisation on the CPU; the equation is in ncsn_fast/group_norm.h, the passes over memory are in
// norm_passes.h. A group's statistics are those of its channels, merged; what is added to a channel only
// moves its mean.
#include "ncsn_fast/group_norm.h"

#include "norm_passes.h"

namespace ncsn_fast::NCSN_ISA {

// Value of an optional parameter.
static inline double value_or(const float* p, int64_t i, double otherwise) {
    return p == nullptr ? otherwise : static_cast<double>(p[i]);
}

static void finalise_groups(const void* norm, int64_t n, ChannelStats stats, Affine out) {
    const GroupNormArgs& args = *static_cast<const GroupNormArgs*>(norm);
    const int64_t size = args.channels / args.groups, row = n * args.channels;
    const double members = static_cast<double>(size), plane = static_cast<double>(args.plane);
    for (int64_t first = 0; first < args.channels; first += size) {
        double centre = 0.0, squares = 0.0, spread = 0.0;
        for (int64_t c = first; c < first + size; ++c) {
            centre += stats.mean[c] + value_or(args.add, row + c, 0.0);
        }
        centre /= members;
        for (int64_t c = first; c < first + size; ++c) {
            const double away = stats.mean[c] + value_or(args.add, row + c, 0.0) - centre;
            squares += stats.squares[c];
            spread += away * away;
        }
        const double variance = (squares / plane + spread) / members;
        const double rstd = 1.0 / __builtin_sqrt(variance + args.eps);
        for (int64_t c = first; c < first + size; ++c) {
            const double modulation = 1.0 + value_or(args.scale, row + c, 0.0);
            const double mean = centre - value_or(args.add, row + c, 0.0);
            const double scale = value_or(args.gamma, c, 1.0) * rstd * modulation;
            const double shift = value_or(args.beta, c, 0.0) * modulation + value_or(args.shift, row + c, 0.0);
            const float rounded = static_cast<float>(mean);
            out.mean[c] = rounded;
            out.scale[c] = static_cast<float>(scale);
            out.shift[c] = static_cast<float>(shift - (mean - rounded) * scale);
        }
    }
}

void group_norm(const GroupNormArgs& args, const NormContext& context, const NormPlan& plan,
                const NormWorkspace& workspace) {
    const NormMaps maps{args.batch,         args.channels, args.plane,     args.x,          args.y,
                        args.channels_last, args.in_dtype, args.out_dtype, args.activation, context};
    run_norm(maps, plan, workspace, Passes::kBoth, finalise_groups, &args);
}

static void finalise_scale_shift(const void* affine, int64_t n, ChannelStats, Affine out) {
    const ScaleShiftArgs& args = *static_cast<const ScaleShiftArgs*>(affine);
    const int64_t row = n * args.channels;
    for (int64_t c = 0; c < args.channels; ++c) {
        out.mean[c] = 0.0f;
        out.scale[c] = args.scale == nullptr ? 1.0f : args.scale[row + c];
        out.shift[c] = args.shift == nullptr ? 0.0f : args.shift[row + c];
    }
}

void scale_shift(const ScaleShiftArgs& args, const NormPlan& plan, const NormWorkspace& workspace) {
    const NormContext context{nullptr, 0, dense_pixels(1, args.plane, args.channels)};
    const NormMaps maps{args.batch,         args.channels, args.plane,     args.x,          args.y,
                        args.channels_last, args.in_dtype, args.out_dtype, args.activation, context};
    run_norm(maps, plan, workspace, Passes::kApply, finalise_scale_shift, &args);
}

}  // namespace ncsn_fast::NCSN_ISA
