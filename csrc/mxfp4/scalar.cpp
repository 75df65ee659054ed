#include "scalar.hpp"

#include <cstring>

#include "kernel_sets.hpp"
#include "scale_search.hpp"
#include "tables.hpp"

namespace moe_surgery::mxfp4 {
namespace {

std::uint16_t load16(const std::uint8_t* from) {
    std::uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits;
}

void store16(std::uint8_t* to, std::uint16_t bits) { std::memcpy(to, &bits, sizeof bits); }

// Built from the bits, so that a thread that flushes subnormal floats to zero counts them too.
double to_double(std::uint16_t bits) {
    const std::uint64_t exponent = (bits >> 7) & 255;
    const std::uint64_t fraction = bits & 127;
    if (exponent == 0) return static_cast<double>(fraction) * 0x1p-133;
    const std::uint64_t wide = ((exponent + 1023 - 127) << 52) | (fraction << 45);
    double magnitude;
    std::memcpy(&magnitude, &wide, sizeof magnitude);
    return magnitude;
}

// Sign and position of both values agree (rounding keeps the sign), so magnitudes are enough.
double squared_distance(std::uint16_t a, std::uint16_t b) {
    const double difference = to_double(a) - to_double(b);
    return difference * difference;
}

unsigned largest_magnitude(const std::uint16_t* values) {
    unsigned largest = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        const unsigned magnitude = values[i] & kMagnitude;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

// A finite magnitude in units of 2^-10 times a scale, rounded down; exact from 1/8 of the scale on.
int fixed_point(unsigned magnitude, unsigned scale) {
    const int exponent = static_cast<int>(magnitude >> 7);
    const int significand = static_cast<int>(magnitude & 127) + (exponent > 0 ? 128 : 0);
    const int shift = (exponent > 0 ? exponent : 1) - static_cast<int>(scale) + 3;
    return shift >= 0 ? significand << shift : shift > -8 ? significand >> -shift : 0;
}

// What a value of z units of 2^-10 gains under the finer scale where this has one more code, at `middle`.
int gain_near(int z, int middle) {
    const int distance = z < middle ? middle - z : z - middle;
    return distance < 128 ? 128 - distance : 0;
}

// Whether the scale below `coarse` gives a block, whose largest value is below 4.46875 times `coarse`,
// a lower squared error. Everything is in units of 2^-11; see scale_search.hpp.
bool finer_is_better(const std::uint16_t* values, unsigned coarse) {
    int gain = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        const int z = fixed_point(values[i] & kMagnitude, coarse);
        gain += gain_near(z, 256) + gain_near(z, 768);
        gain -= z > 3584 ? 4 * z - 14336 : 0;
    }
    return gain > 0;
}

// The best of the first scale (the exponent of the largest value less that of the largest code,
// 6 = 1.5 * 2^2, or 0) and its neighbours. An exact block keeps the first: it gains nothing elsewhere.
unsigned choose_scale(const std::uint16_t* values, unsigned largest) {
    if (largest >= kInfinity) return kOverflowScale;
    const unsigned exponent = largest >> 7;
    const unsigned fraction = largest & 127;
    if (exponent < 2) return 0;
    const unsigned first = exponent - 2;
    if (fraction > kFractionOfSeven && first < kLargestScale) {
        return finer_is_better(values, first + 1) ? first : first + 1;
    }
    const bool finer = fraction < kFractionOfNoGain && first > 0 && finer_is_better(values, first);
    return finer ? first - 1 : first;
}

unsigned nearest_code(std::uint16_t value, const std::uint16_t* least) {
    const unsigned magnitude = value & kMagnitude;
    unsigned code = 0;
    for (int i = 0; i < 7; ++i) code += magnitude >= least[i];
    return code | ((value >> 12) & 8);
}

struct BlockResult {
    std::uint8_t scale;
    bool exact;
    bool possible;
};

BlockResult encode_block(const std::uint16_t* values, std::uint8_t* block, EncodeReport& report) {
    const unsigned largest = largest_magnitude(values);
    const unsigned scale = choose_scale(values, largest);
    std::uint8_t codes[kBlockValues];
    double error_sq = 0.0;
    double norm_sq = 0.0;
    bool exact = true;
    for (int i = 0; i < kBlockValues; ++i) {
        codes[i] = static_cast<std::uint8_t>(nearest_code(values[i], kRounding.least[scale]));
        const std::uint16_t decoded = kDecode.bits[scale][codes[i]];
        exact = exact && decoded == values[i];
        error_sq += squared_distance(values[i], decoded);
        norm_sq += squared_distance(values[i], 0);
    }
    for (int i = 0; i < kBlockBytes; ++i) {
        block[i] = static_cast<std::uint8_t>(codes[2 * i] | (codes[2 * i + 1] << 4));
    }
    const bool finite = largest < kInfinity;
    if (finite) {
        report.error_sq += error_sq;
        report.norm_sq += norm_sq;
    }
    return {static_cast<std::uint8_t>(scale), exact, finite || exact};
}

void note_bad_block(EncodeReport& report, std::ptrdiff_t row, std::ptrdiff_t block) {
    const bool earlier = report.bad_row < 0 || row < report.bad_row ||
                         (row == report.bad_row && block < report.bad_block);
    if (earlier) {
        report.bad_row = row;
        report.bad_block = block;
    }
}

void decode(const PackedView& in, const MatrixSink& out) {
    for (std::ptrdiff_t row = 0; row < in.rows; ++row) {
        const std::uint8_t* blocks = in.blocks + row * in.block_stride;
        const std::uint8_t* scales = in.scales + row * in.scale_stride;
        std::uint8_t* to = out.data + row * out.stride;
        for (std::ptrdiff_t block = 0; block < in.groups; ++block) {
            decode_block_exactly(blocks + block * kBlockBytes, scales[block], to + block * 2 * kBlockValues);
        }
    }
}

void decode_transposed(const PackedView& in, const MatrixSink& out) {
    // A few rows at a time, so that their cache lines are still cached for the next block.
    constexpr std::ptrdiff_t kRows = 64;
    for (std::ptrdiff_t first = 0; first < in.rows; first += kRows) {
        const std::ptrdiff_t count = in.rows - first < kRows ? in.rows - first : kRows;
        for (std::ptrdiff_t block = 0; block < in.groups; ++block) {
            decode_transposed_rows(in, out, block, first, count);
        }
    }
}

EncodeReport encode_transposed(const MatrixView& in, const PackedSink& out) {
    EncodeReport report;
    for (std::ptrdiff_t block = 0; block < out.groups; ++block) {
        encode_transposed_rows(in, out, block, 0, out.rows, report);
    }
    return report;
}

}  // namespace

void decode_block_exactly(const std::uint8_t* block, unsigned scale, std::uint8_t* to) {
    const std::uint16_t* table = kDecode.bits[scale];
    for (int i = 0; i < kBlockBytes; ++i) {
        store16(to + 4 * i, table[block[i] & 15]);
        store16(to + 4 * i + 2, table[block[i] >> 4]);
    }
}

void decode_transposed_rows(const PackedView& in, const MatrixSink& out, std::ptrdiff_t block,
                            std::ptrdiff_t first, std::ptrdiff_t count) {
    const std::uint8_t* blocks = in.blocks + first * in.block_stride + block * kBlockBytes;
    const std::uint8_t* scales = in.scales + first * in.scale_stride + block;
    std::uint8_t* to = out.data + block * kBlockValues * out.stride + first * 2;
    // Rows innermost, so that the stores are consecutive.
    for (int i = 0; i < kBlockBytes; ++i, to += 2 * out.stride) {
        for (std::ptrdiff_t row = 0; row < count; ++row) {
            const std::uint16_t* table = kDecode.bits[scales[row * in.scale_stride]];
            const unsigned byte = blocks[row * in.block_stride + i];
            store16(to + row * 2, table[byte & 15]);
            store16(to + out.stride + row * 2, table[byte >> 4]);
        }
    }
}

void encode_transposed_rows(const MatrixView& in, const PackedSink& out, std::ptrdiff_t block,
                            std::ptrdiff_t first, std::ptrdiff_t count, EncodeReport& report) {
    const std::uint8_t* from = in.data + block * kBlockValues * in.stride;
    for (std::ptrdiff_t row = first; row < first + count; ++row) {
        std::uint16_t values[kBlockValues];
        for (int i = 0; i < kBlockValues; ++i) values[i] = load16(from + i * in.stride + row * 2);
        std::uint8_t* bytes = out.blocks + row * out.block_stride + block * kBlockBytes;
        const BlockResult result = encode_block(values, bytes, report);
        out.scales[row * out.scale_stride + block] = result.scale;
        report.inexact_blocks += result.exact ? 0 : 1;
        if (!result.possible) note_bad_block(report, row, block);
    }
}

const Kernels kScalarKernels = {"scalar", decode, decode_transposed, encode_transposed};

}  // namespace moe_surgery::mxfp4
