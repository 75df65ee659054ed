// Values of a dtype as floats. In an unnamed namespace, so that what one instruction set's file
// compiles is never linked into another's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"

namespace moe_surgery::cpu {
namespace {

inline float from_bits(std::uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline float bf16_at(const std::uint8_t* p, std::ptrdiff_t i) {
    std::uint16_t bits;
    __builtin_memcpy(&bits, p + 2 * i, sizeof bits);
    return from_bits(static_cast<std::uint32_t>(bits) << 16);
}

inline float f16_at(const std::uint8_t* p, std::ptrdiff_t i) {
    std::uint16_t bits;
    __builtin_memcpy(&bits, p + 2 * i, sizeof bits);
    const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 0x3ffu;
    if (exponent == 31) {  // infinite or NaN, which becomes a quiet one
        return from_bits(sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0u));
    }
    if (exponent == 0) {
        const float size = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -size : size;
    }
    return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

inline float f32_at(const std::uint8_t* p, std::ptrdiff_t i) {
    float value;
    __builtin_memcpy(&value, p + 4 * i, sizeof value);
    return value;
}

inline float value_at(const Values& values, std::ptrdiff_t i) {
    switch (values.dtype) {
        case Dtype::f16: return f16_at(values.data, i);
        case Dtype::f32: return f32_at(values.data, i);
        case Dtype::bf16:
        case Dtype::q8_0: break;  // no values alone
    }
    return bf16_at(values.data, i);
}

// Adds values first .. last, if there are any, to y[0 ..].
inline void add_values(const Values& values, std::ptrdiff_t first, std::ptrdiff_t last, float* y) {
    if (!values.data) return;
    const auto add = [&](auto at) {
        for (std::ptrdiff_t i = first; i < last; ++i) y[i - first] += at(values.data, i);
    };
    switch (values.dtype) {
        case Dtype::bf16: return add(bf16_at);
        case Dtype::f16: return add(f16_at);
        case Dtype::f32: return add(f32_at);
        case Dtype::q8_0: break;
    }
}

}  // namespace
}  // namespace moe_surgery::cpu
