// Bindings for `ncsn_fast.ops.gradients`.
#pragma once

#include <pybind11/pybind11.h>

namespace ncsn_fast {

void bind_gradients(pybind11::module_& m);

}  // namespace ncsn_fast
