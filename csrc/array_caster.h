// Python's (address, bytes) as an Array.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "array.h"

namespace pybind11::detail {

template <>
struct type_caster<ncsn_fast::Array> {
    PYBIND11_TYPE_CASTER(ncsn_fast::Array, const_name("tuple[int, int]"));

    bool load(handle from, bool convert) {
        if (!PyTuple_CheckExact(from.ptr()) || PyTuple_GET_SIZE(from.ptr()) != 2) return false;
        make_caster<uintptr_t> address;
        make_caster<int64_t> bytes;
        if (!address.load(PyTuple_GET_ITEM(from.ptr(), 0), convert) ||
            !bytes.load(PyTuple_GET_ITEM(from.ptr(), 1), convert)) {
            return false;
        }
        value = {cast_op<uintptr_t>(address), cast_op<int64_t>(bytes)};
        return true;
    }
};

}  // namespace pybind11::detail
