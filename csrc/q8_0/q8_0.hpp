// Values to Q8_0 as in GGUF files: the interface of the native core. It knows nothing of Python.
//
// A block is 32 values as 34 bytes: the scale d as F16, then 32 signed bytes q; value i is d * q[i]. Pointers
// may be unaligned. The rule is ggml's (quantize_row_q8_0_ref of ggml-quants.c): d = max|x| / 127 and
// q = x * (1 / d), rounded to the nearest, ties away from zero, all in F32. A block whose 1 / d overflows
// has q = 0: its d is 0 in F16.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_surgery::q8_0 {

constexpr std::ptrdiff_t kBlockValues = 32;
constexpr std::ptrdiff_t kBlockBytes = 34;

// One implementation; all of them give the same bits. Both return the first block that Q8_0 cannot hold (a NaN, an
// infinity, a scale beyond F16), or -1 when there is none; such blocks are not written.
struct Kernels {
    const char* name;
    std::ptrdiff_t (*encode_bf16)(const std::uint8_t* values, std::ptrdiff_t blocks, std::uint8_t* out);
    std::ptrdiff_t (*encode_f32)(const std::uint8_t* values, std::ptrdiff_t blocks, std::uint8_t* out);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
#endif

}  // namespace moe_surgery::q8_0
