// Instance normalisation++ on the CPU; the equation is in ncsn_fast/instance_norm_plus.h, the passes over
// memory are in norm_passes.h.
#include "ncsn_fast/instance_norm_plus.h"

#include "norm_passes.h"

namespace ncsn_fast::NCSN_ISA {

// Computes the mean, scale and shift that normalise each channel of sample n.
static void finalise(const void* norm, int64_t n, ChannelStats stats, Affine out) {
    const NormArgs& args = *static_cast<const NormArgs*>(norm);
    const int64_t channels = args.channels;
    const double *mean = stats.mean, *squares = stats.squares;
    // A bias moves the means only; x - mean and the variances do not change.
    const auto moved = [&](int64_t c) { return args.bias == nullptr ? mean[c] : mean[c] + args.bias[c]; };
    double centre = 0.0, spread = 0.0;
    for (int64_t c = 0; c < channels; ++c) centre += moved(c);
    centre /= static_cast<double>(channels);
    for (int64_t c = 0; c < channels; ++c) spread += (moved(c) - centre) * (moved(c) - centre);
    spread /= static_cast<double>(channels > 1 ? channels - 1 : 1);
    const double rstd_channels = 1.0 / __builtin_sqrt(spread + args.eps);
    const double plane = static_cast<double>(args.plane);
    const float *alpha = args.alpha + n * args.alpha_row, *gamma = args.gamma + n * args.gamma_row;
    const float* beta = args.beta + n * args.beta_row;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
        const double scale = gamma[c] / __builtin_sqrt(squares[c] / plane + args.eps);
        const double mean_hat = (moved(c) - centre) * rstd_channels;
        const float rounded = static_cast<float>(mean[c]);
        const double shift = static_cast<double>(gamma[c]) * alpha[c] * mean_hat + beta[c];
        out.mean[c] = rounded;
        out.scale[c] = static_cast<float>(scale);
        out.shift[c] = static_cast<float>(shift - (mean[c] - rounded) * scale);
    }
}

void instance_norm_plus(const NormArgs& args, const NormContext& context, const NormPlan& plan,
                        const NormWorkspace& workspace) {
    const NormMaps maps{args.batch,    args.channels,  args.plane,         args.x,
                        args.y,        args.channels_last, args.in_dtype, args.out_dtype,
                        args.elu ? Activation::kElu : Activation::kNone,
                        context};
    run_norm(maps, plan, workspace, Passes::kBoth, finalise, &args);
}

}  // namespace ncsn_fast::NCSN_ISA
