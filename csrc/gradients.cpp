// Bindings of the gradients of norms and activations, for `ncsn_fast.ops.gradients`.
#include "gradients.h"

#include "array_caster.h"
#include "cpu/kernels.h"
#include "steps.h"

namespace py = pybind11;

namespace ncsn_fast {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

// Three sizes: batch, channels, plane.
using Planes = std::array<int64_t, 3>;

int64_t checked_planes(const Planes& sizes) {
    return checked_count({{"batch", sizes[0]}, {"channels", sizes[1]}, {"plane", sizes[2]}});
}

void channel_moments(const Array& x, const Array& moments, const Planes& sizes, bool channels_last, bool bfloat16,
                     int isa) {
    const int64_t count = checked_planes(sizes);
    const auto [batch, channels, plane] = sizes;
    const int64_t results = checked_count({{"batch", batch}, {"channels", channels}, {"two", 2}});
    moments_cpu({batch, channels, plane, required("x", x, count, dtype(bfloat16)),
                 required<double>("moments", moments, results), channels_last, dtype(bfloat16)},
                isa);
}

void norm_gradient(const Array& x, const Array& grad, const Array& rows, const Array& sums, const Array& out,
                   const Planes& sizes, bool channels_last, bool bfloat16, int64_t code, int isa) {
    const int64_t count = checked_planes(sizes);
    const auto [batch, channels, plane] = sizes;
    const int64_t parameters = checked_count({{"batch", batch}, {"channels", channels}, {"five", 5}});
    norm_gradient_cpu({batch, channels, plane, required("x", x, count, dtype(bfloat16)),
                       required("grad", grad, count, dtype(bfloat16)),
                       optional<const float>("rows", rows, parameters),
                       optional<double>("sums", sums, parameters / 5 * 2),
                       optional("out", out, count, dtype(bfloat16)), channels_last, dtype(bfloat16),
                       activation(code)},
                      isa);
}

}  // namespace

void bind_gradients(py::module_& m) {
    m.def("channel_moments", &channel_moments, NoGil(),
          "(x, moments, (batch, channels, plane), channels_last, bfloat16, isa): moments (batch, 2, channels) "
          "float64 are the means and the biased variances.");
    m.def("norm_gradient", &norm_gradient, NoGil(),
          "(x, grad, rows, sums, out, (batch, channels, plane), channels_last, bfloat16, activation, isa): rows "
          "(batch, 5, channels) are mean, scale, shift, slope and offset, (0, 0) for an activation alone; sums "
          "(batch, 2, channels) float64 or out (0, 0) where they are not wanted.");
}

}  // namespace ncsn_fast
