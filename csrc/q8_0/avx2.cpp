// The same loops with AVX2. The instructions are switched on for this file alone, before any include.
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#include "encode.inl"

namespace moe_surgery::q8_0 {

const Kernels kAvx2Kernels = {"avx2", encode<Bf16>, encode<F32>};

}  // namespace moe_surgery::q8_0

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
