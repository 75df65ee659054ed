// The implementations that can be compiled in, one per translation unit.
#pragma once

#include "mxfp4.hpp"

namespace moe_surgery::mxfp4 {

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace moe_surgery::mxfp4
