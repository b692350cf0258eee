// The table of one instruction-set level.
#include "level.h"

namespace ncsn_fast::NCSN_ISA {

extern const Kernels kKernels;
const Kernels kKernels{noise,   box_muller_pairs, instance_norm_plus, sampler_update,
                       add_elu, pool5,            mean_pool2,         resize_add,     winograd};

}  // namespace ncsn_fast::NCSN_ISA
