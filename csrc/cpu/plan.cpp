#include "plan.h"

#include <chrono>
#include <cstring>
#include <stdexcept>

namespace ncsn_fast {
namespace {

void check_torch(int32_t error, const char* what, const std::string& name) {
    if (error == 0) return;
    throw std::runtime_error(std::string("torch could not run the ") + what + " " + name +
                             "; its message is on standard error. Use engine='eager', and please report it.");
}

}  // namespace

Plan::~Plan() {
    for (Torch::Tensor tensor : tensors_) torch_.release(tensor);
}

void Plan::own(std::initializer_list<Torch::Tensor> tensors) {
    for (Torch::Tensor tensor : tensors) {
        if (tensor != nullptr) tensors_.push_back(tensor);
    }
}

void Plan::add(Convolution convolution) {
    own({convolution.destination, convolution.x, convolution.weight, convolution.bias});
    add([torch = torch_, c = std::move(convolution)](int) mutable {
        zero_cpu(c.memory, c.zero);
        Torch::Tensor result = nullptr;
        const int32_t error = torch.convolution_add(
            c.destination, c.x, c.weight, c.bias == nullptr ? nullptr : &c.bias, c.padding.data(), 2,
            c.stride.data(), 2, c.dilation.data(), 2, c.groups, "add", nullptr, nullptr, nullptr, 0, nullptr,
            &result);
        check_torch(error, "convolution", c.name);
        torch.release(result);
    });
}

void Plan::add(Product product) {
    own({product.out, product.added, product.a, product.b});
    add([torch = torch_, p = std::move(product)](int) {
        const int32_t error = p.added == nullptr ? torch.products(p.out, p.a, p.b)
                                                 : torch.product_add(p.out, p.added, p.a, p.b, 1.0, 1.0);
        check_torch(error, "product", p.name);
    });
}

void Plan::set_levels(const int64_t* levels, int64_t batch) {
    for (const LevelParameters& p : parameters_) {
        if (batch != p.batch) {
            throw std::invalid_argument("levels must be those of " + std::to_string(p.batch) +
                                        " images; got " + std::to_string(batch));
        }
        for (int64_t i = 0; i < batch; ++i) {
            if (levels[i] < 0 || levels[i] >= p.levels) {
                throw std::invalid_argument("levels must be in [0, " + std::to_string(p.levels) +
                                            "); got levels[" + std::to_string(i) +
                                            "] = " + std::to_string(levels[i]));
            }
            const float* row = p.table + levels[i] * 3 * p.channels;
            float* const targets[] = {p.gamma, p.alpha, p.beta};
            for (int k = 0; k < 3; ++k) {
                std::memcpy(targets[k] + i * p.channels, row + k * p.channels,
                            static_cast<size_t>(p.channels) * sizeof(float));
            }
        }
    }
}

void Plan::run(int isa) {
    for (const Step& step : steps_) step(isa);
}

void Plan::profile(int isa, double* seconds) {
    using Clock = std::chrono::steady_clock;
    for (size_t i = 0; i < steps_.size(); ++i) {
        const auto began = Clock::now();
        steps_[i](isa);
        seconds[i] += std::chrono::duration<double>(Clock::now() - began).count();
    }
}

void Plan::sample(UpdateArgs args, const std::vector<Row>& rows, int isa,
                  const std::function<void()>& between) {
    for (const Row& row : rows) {
        run(isa);
        args.row = row;
        sampler_update_cpu(args, isa);
        between();
    }
}

}  // namespace ncsn_fast
