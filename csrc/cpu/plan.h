// A network as a list of steps on preplanned buffers, and the sampling loop.
//
// Convolutions are those of the oneDNN inside libtorch, reached through libtorch's C interface (the
// one that ahead-of-time compiled models use); Python hands over the functions' addresses, so this
// module needs no torch to be built. A convolution adds to its destination: residual sums come free,
// and nothing is allocated, because a plain convolution adds to zeros.
#pragma once

#include <array>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "kernels.h"

namespace ncsn_fast {

// Functions of libtorch; all return 0 on success.
struct Torch {
    using Tensor = void*;  // an owned reference to a tensor
    using ConvolutionAdd = int32_t (*)(Tensor destination, Tensor x, Tensor weight, Tensor* bias,
                                       const int64_t* padding, int64_t, const int64_t* stride, int64_t,
                                       const int64_t* dilation, int64_t, int64_t groups,
                                       const char* binary, double* alpha, const char** unary,
                                       const double** scalars, int64_t, const char** algorithm,
                                       Tensor* result);
    using ProductAdd = int32_t (*)(Tensor out, Tensor added, Tensor a, Tensor b, double beta, double alpha);
    using Products = int32_t (*)(Tensor out, Tensor a, Tensor b);
    using Release = int32_t (*)(Tensor);

    ConvolutionAdd convolution_add;
    ProductAdd product_add;
    Products products;
    Release release;
};

// destination += convolution of x, channels-last; `zero` bytes at `memory` (the destination's) are
// cleared first. The tensors belong to the plan.
struct Convolution {
    std::string name;  // for errors
    Torch::Tensor destination, x, weight, bias;  // bias null: none
    std::array<int64_t, 2> padding, stride, dilation;
    int64_t groups;
    void* memory;
    int64_t zero;
};

// out = added + a b for matrices, or out = a b for each of a batch of them if there is no `added`. The
// tensors belong to the plan.
struct Product {
    std::string name;  // for errors
    Torch::Tensor out, added, a, b;
};

// Parameters of a norm of each sample's noise level: rows of `table` (levels, 3 channels), which
// holds gamma, alpha and beta.
struct LevelParameters {
    const float* table;
    int64_t levels, batch, channels;
    float *alpha, *gamma, *beta;  // (batch, channels)
};

using Step = std::function<void(int isa)>;

// Not thread-safe: the caller must serialise calls, which share its buffers.
class Plan {
  public:
    explicit Plan(Torch torch) : torch_(torch) {}
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;
    ~Plan();

    void add(Step step) { steps_.push_back(std::move(step)); }
    void add(Convolution convolution);
    void add(Product product);
    void add(LevelParameters parameters) { parameters_.push_back(parameters); }

    // Reads the parameters of every norm for the level of each sample.
    void set_levels(const int64_t* levels, int64_t batch);

    void run(int isa);

    // Adds the seconds of each step to `seconds` (one for each step, in order).
    void profile(int isa, double* seconds);

    // For each row: run, then the update of that row; `between` is called after each.
    void sample(UpdateArgs args, const std::vector<Row>& rows, int isa,
                const std::function<void()>& between);

    size_t size() const { return steps_.size(); }

  private:
    void own(std::initializer_list<Torch::Tensor> tensors);

    Torch torch_;
    std::vector<Step> steps_;
    std::vector<LevelParameters> parameters_;
    std::vector<Torch::Tensor> tensors_;
};

}  // namespace ncsn_fast
