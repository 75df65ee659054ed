// The kernels for AVX-512 with integer dot products. Switched on for this file alone, before any include.
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
// GCC takes the deliberately undefined operands inside its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels.inl"
#include "lanes_avx512.inl"

namespace moe_surgery::cpu {

const Kernels kAvx512VnniKernels = kernels_over<LanesAvx512<true>>("avx512vnni");

}  // namespace moe_surgery::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
