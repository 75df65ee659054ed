// The number formats as compile-time tables of BF16 bits.
#pragma once

#include <cstdint>

namespace moe_surgery::mxfp4 {

constexpr unsigned kInfinity = 0x7f80;
constexpr unsigned kMagnitude = 0x7fff;
// Blocks with infinities are encoded with this scale: codes 6 and 7 overflow, and its finite values
// include those of the other scales that overflow (254 and 255).
constexpr unsigned kOverflowScale = 253;

// BF16 bits of n * 2^exponent, for n of at most 8 significant bits; exact or infinite.
constexpr std::uint16_t bf16_bits(unsigned n, int exponent) {
    if (n == 0) return 0;
    while (n < 128) {
        n <<= 1;
        --exponent;
    }
    // n is now the significand with its leading one at bit 7: value = n * 2^exponent.
    const int biased = exponent + 134;
    if (biased >= 255) return kInfinity;
    if (biased >= 1) return static_cast<std::uint16_t>((biased << 7) | (n & 127));
    return static_cast<std::uint16_t>(n >> (1 - biased));
}

struct DecodeTable {
    std::uint16_t bits[256][16];
};

struct RoundingTable {
    // least[s][i]: the least magnitude that rounds to code i + 1 or above under scale s.
    std::uint16_t least[256][7];
};

constexpr DecodeTable make_decode_table() {
    constexpr unsigned doubled[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    DecodeTable table{};
    for (int scale = 0; scale < 256; ++scale) {
        for (int code = 0; code < 8; ++code) {
            const std::uint16_t bits = bf16_bits(doubled[code], scale - 128);
            table.bits[scale][code] = bits;
            table.bits[scale][code + 8] = static_cast<std::uint16_t>(bits | 0x8000);
        }
    }
    return table;
}

// Midpoints between neighbouring values; a tie goes to the even code, so every other midpoint
// still rounds down and the least magnitude that rounds up is one bit above it.
constexpr RoundingTable make_rounding_table() {
    constexpr unsigned quadrupled[7] = {1, 3, 5, 7, 10, 14, 20};
    RoundingTable table{};
    for (int scale = 0; scale < 256; ++scale) {
        for (int i = 0; i < 7; ++i) {
            const unsigned midpoint = bf16_bits(quadrupled[i], scale - 129);
            table.least[scale][i] = static_cast<std::uint16_t>(midpoint + (i % 2 == 0 ? 1 : 0));
        }
    }
    return table;
}

inline constexpr DecodeTable kDecode = make_decode_table();
inline constexpr RoundingTable kRounding = make_rounding_table();

}  // namespace moe_surgery::mxfp4
