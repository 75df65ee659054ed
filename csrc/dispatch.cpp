#include "dispatch.hpp"

#include <stdexcept>

#include "kernel_sets.hpp"

namespace moe_surgery::mxfp4 {
namespace {

std::vector<const Kernels*> find_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(&kAvx512Kernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(&kAvx2Kernels);
    }
#elif defined(__aarch64__)
    found.push_back(&kNeonKernels);
#endif
    found.push_back(&kScalarKernels);
    return found;
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
    static const std::vector<const Kernels*> kernels = find_kernels();
    return kernels;
}

const Kernels& select_kernels(const std::string& name) {
    const auto& kernels = available_kernels();
    if (name.empty()) return *kernels.front();
    std::string names;
    for (const Kernels* candidate : kernels) {
        if (name == candidate->name) return *candidate;
        names += names.empty() ? candidate->name : std::string(", ") + candidate->name;
    }
    throw std::invalid_argument("instruction set '" + name +
                                "' is not available here; available: " + names);
}

}  // namespace moe_surgery::mxfp4
