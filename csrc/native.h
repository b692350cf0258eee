// Bindings for `ncsn_fast.ops.native`: rows in memory, strided maps and parameters.
#pragma once

#include <pybind11/pybind11.h>

namespace ncsn_fast {

void bind_native(pybind11::module_& m);

}  // namespace ncsn_fast
