// Python's (address, bytes), or (address, bytes, row), as an Array.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "array.h"

namespace pybind11::detail {

template <>
struct type_caster<ncsn_fast::Array> {
    PYBIND11_TYPE_CASTER(ncsn_fast::Array, const_name("tuple[int, int]"));

    bool load(handle from, bool convert) {
        if (!PyTuple_CheckExact(from.ptr())) return false;
        const auto size = PyTuple_GET_SIZE(from.ptr());
        if (size != 2 && size != 3) return false;
        make_caster<uintptr_t> address;
        make_caster<int64_t> bytes, row;
        if (!address.load(PyTuple_GET_ITEM(from.ptr(), 0), convert) ||
            !bytes.load(PyTuple_GET_ITEM(from.ptr(), 1), convert)) {
            return false;
        }
        if (size == 3 && !row.load(PyTuple_GET_ITEM(from.ptr(), 2), convert)) return false;
        value = {cast_op<uintptr_t>(address), cast_op<int64_t>(bytes), size == 3 ? cast_op<int64_t>(row) : 0};
        return true;
    }
};

}  // namespace pybind11::detail
