// The table of one instruction-set level.
#include "level.h"

namespace ncsn_fast::NCSN_ISA {

extern const Kernels kKernels;
const Kernels kKernels{
    noise,         box_muller_pairs, instance_norm_plus, group_norm,           scale_shift, moments,
    norm_gradient, sampler_update, add_activation, pool5,           mean_pool2,         resize_add,           copy_channels,
    upsample_nearest, depth_to_space, depthwise_transposed, attention, softmax, winograd};

}  // namespace ncsn_fast::NCSN_ISA
