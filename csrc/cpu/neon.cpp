// The kernels for NEON, which every aarch64 processor has.
#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#include "kernels.inl"
#include "lanes_neon.inl"

namespace moe_surgery::cpu {

const Kernels kNeonKernels = kernels_over<LanesNeon>("neon");

}  // namespace moe_surgery::cpu
#endif
