// The kernels for AVX2. Switched on for this file alone, before any include.
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels.inl"
#include "lanes_avx2.inl"

namespace moe_surgery::cpu {

const Kernels kAvx2Kernels = kernels_over<LanesAvx2>("avx2");

}  // namespace moe_surgery::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
