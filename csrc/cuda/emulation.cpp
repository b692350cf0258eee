#include "group_norm_launch.h"
#include "kernels.h"
#include "norm_launch.h"
#include "update_phases.h"

namespace ncsn_fast {

void emulated_sampler_update(const UpdateArgs& args, bool backward) {
    launch_update(args, Emulator{backward});
}

void emulated_instance_norm_plus(const NormArgs& args, float* partials, bool single, bool backward) {
    launch_norm(args, partials, single, Emulator{backward});
}

void emulated_group_norm(const GroupNormArgs& args, float* partials, float* coefficients, bool backward) {
    launch_group_norm(args, partials, coefficients, Emulator{backward});
}

int64_t norm_tiles(int64_t channels, int64_t plane, Dtype dtype) {
    return channels * plane == 0 ? 0 : Tiling::of(channels, plane, dtype).tiles;
}

}  // namespace ncsn_fast
