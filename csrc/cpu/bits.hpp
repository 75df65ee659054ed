// Floats and BF16 values as their bits. In an unnamed namespace, so that what one instruction set's file
// compiles is never linked into another's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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

}  // namespace
}  // namespace moe_surgery::cpu
