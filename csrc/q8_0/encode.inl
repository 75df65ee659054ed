// The encoder, in loops that compilers vectorise; compiled once per instruction set.
#include <cstring>

#include "q8_0.hpp"

namespace moe_surgery::q8_0 {
namespace {

constexpr std::uint32_t kMagnitude = 0x7fffffff;
constexpr std::uint32_t kInfinity = 0x7f800000;
constexpr std::uint32_t kTooLargeForF16 = 0x477ff000;  // rounds to 65536
constexpr std::uint32_t kLeastNormalF16 = 0x38800000;

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// F32 bits of a number from 0 up to what F16 can hold, as F16 bits: rounded to the nearest, ties to even.
inline std::uint16_t to_f16(std::uint32_t bits) {
    if (bits < kLeastNormalF16) {  // the sum's last bit is F16's last subnormal bit
        return static_cast<std::uint16_t>(bits_of(float_of(bits) + 0.5f) - bits_of(0.5f));
    }
    const std::uint32_t rebased = bits - (112u << 23);
    return static_cast<std::uint16_t>((rebased + 0xfff + ((rebased >> 13) & 1)) >> 13);
}

struct Bf16 {
    static constexpr std::ptrdiff_t kBytes = 2;
    static void load(const std::uint8_t* from, std::uint32_t* bits) {
        for (int i = 0; i < kBlockValues; ++i) {
            std::uint16_t word;
            std::memcpy(&word, from + kBytes * i, sizeof word);
            bits[i] = static_cast<std::uint32_t>(word) << 16;
        }
    }
};

struct F32 {
    static constexpr std::ptrdiff_t kBytes = 4;
    static void load(const std::uint8_t* from, std::uint32_t* bits) {
        std::memcpy(bits, from, kBlockValues * sizeof *bits);
    }
};

// False, with nothing written, for a block that Q8_0 cannot hold.
inline bool encode_block(const std::uint32_t* bits, std::uint8_t* out) {
    std::uint32_t largest = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        const std::uint32_t magnitude = bits[i] & kMagnitude;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= kInfinity) return false;
    const float scale = float_of(largest) / 127.0f;
    if (bits_of(scale) >= kTooLargeForF16) return false;
    float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    if (bits_of(inverse) >= kInfinity) inverse = 0.0f;

    std::int8_t codes[kBlockValues];
    for (int i = 0; i < kBlockValues; ++i) {
        const float x = float_of(bits[i]) * inverse;
        const float magnitude = float_of(bits_of(x) & kMagnitude);
        std::int32_t code = static_cast<std::int32_t>(magnitude);
        code += magnitude - static_cast<float>(code) >= 0.5f ? 1 : 0;  // the difference is exact
        codes[i] = static_cast<std::int8_t>(x < 0.0f ? -code : code);
    }
    const std::uint16_t f16 = to_f16(bits_of(scale));
    std::memcpy(out, &f16, sizeof f16);
    std::memcpy(out + sizeof f16, codes, sizeof codes);
    return true;
}

template <class Source>
std::ptrdiff_t encode(const std::uint8_t* values, std::ptrdiff_t blocks, std::uint8_t* out) {
    std::ptrdiff_t bad = -1;
    for (std::ptrdiff_t block = 0; block < blocks; ++block) {
        std::uint32_t bits[kBlockValues];
        Source::load(values + block * kBlockValues * Source::kBytes, bits);
        if (!encode_block(bits, out + block * kBlockBytes) && bad < 0) bad = block;
    }
    return bad;
}

}  // namespace
}  // namespace moe_surgery::q8_0
