#include "dispatch.hpp"

#include "../isa/isa.hpp"
#include "kernel_sets.hpp"

namespace moe_surgery::mxfp4 {
namespace {

std::vector<const Kernels*> find_kernels() {
    using isa::Isa;
    std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
    if (isa::supported(Isa::avx512)) kernels.push_back(&kAvx512Kernels);
    if (isa::supported(Isa::avx2)) kernels.push_back(&kAvx2Kernels);
#elif defined(__aarch64__)
    if (isa::supported(Isa::neon)) kernels.push_back(&kNeonKernels);
#endif
    kernels.push_back(&kScalarKernels);
    return kernels;
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
    static const std::vector<const Kernels*> kernels = find_kernels();
    return kernels;
}

const Kernels& select_kernels(const std::string& name) { return isa::select(available_kernels(), name); }

}  // namespace moe_surgery::mxfp4
