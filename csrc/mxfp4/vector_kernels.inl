// The kernels written once over a vector type V; included by one translation unit per instruction
// set, after that file has switched the instruction set on. Everything here has internal linkage
// and no standard header with inline functions is included: the linker could otherwise keep a wide
// copy of a shared function and run it on a processor without those instructions.
//
// V holds 16-byte lanes. Its byte operations stay within lanes, which fixes the order used
// throughout: in a byte vector, position i of lane n is column `column_of<V>(i, n)`, so that
// interleaving the low (high) halves of two byte vectors gives words for the first (second)
// V::kBytes / 2 columns in their natural order, and packing such words gives that byte vector back.
#include "mxfp4.hpp"
#include "scalar.hpp"

namespace moe_surgery::mxfp4 {
namespace {

// Scales whose nonzero values are all normal and finite: multiplying by the factor then is adding
// to the exponent field.
constexpr unsigned kLeastFastScale = 2;
constexpr unsigned kLargestFastScale = 252;

// Low and high bytes of the BF16 bits of codes 0..15 under the scale 2^0.
alignas(16) constexpr std::uint8_t kLowBytes[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0,
                                                    0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
alignas(16) constexpr std::uint8_t kHighBytes[16] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                                     0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};

template <class V>
constexpr std::ptrdiff_t column_of(int position, int lane) {
    const int within = 8 * lane + position % 8;
    return position < 8 ? within : V::kBytes / 2 + within;
}

std::uint16_t exponent_offset(unsigned scale) {
    return static_cast<std::uint16_t>((scale - 127u) << 7);
}

// 16x16 bytes in every lane: four rounds of interleaving halves, the perfect shuffle.
template <class V>
inline void transpose_lanes(typename V::Vec (&x)[16]) {
    for (int round = 0; round < 4; ++round) {
        typename V::Vec y[16];
        for (int i = 0; i < 8; ++i) {
            y[2 * i] = V::interleave_low8(x[i], x[i + 8]);
            y[2 * i + 1] = V::interleave_high8(x[i], x[i + 8]);
        }
        for (int i = 0; i < 16; ++i) x[i] = y[i];
    }
}

template <class V>
struct WordPair {
    typename V::Vec first;
    typename V::Vec second;
};

template <class V>
inline WordPair<V> load_words(const std::uint8_t* from) {
    return {V::load(from), V::load(from + V::kBytes)};
}

template <class V>
inline void store_words(std::uint8_t* to, WordPair<V> words) {
    V::store(to, words.first);
    V::store(to + V::kBytes, words.second);
}

// Codes (bytes 0..15) to BF16 bits; `offset` has the exponent offset of every column.
template <class V>
inline WordPair<V> decode_codes(typename V::Vec codes, WordPair<V> offset) {
    const auto low = V::lookup(V::broadcast_lane(kLowBytes), codes);
    const auto high = V::lookup(V::broadcast_lane(kHighBytes), codes);
    return {V::add_to_nonzero(V::interleave_low8(low, high), offset.first),
            V::add_to_nonzero(V::interleave_high8(low, high), offset.second)};
}

// The exponent offsets of V::kBytes rows, or false when one of their scales needs exact code.
template <class V>
inline bool gather_offsets(const std::uint8_t* scales, std::ptrdiff_t stride, std::uint16_t* offsets) {
    unsigned outside = 0;
    for (int i = 0; i < V::kBytes; ++i) {
        const unsigned scale = scales[i * stride];
        outside |= static_cast<unsigned>(scale - kLeastFastScale > kLargestFastScale - kLeastFastScale);
        offsets[i] = exponent_offset(scale);
    }
    return outside == 0;
}

// V::kBytes rows of one block, to V::kBytes columns of 32 output rows.
template <class V>
inline void decode_tile(const std::uint8_t* blocks, std::ptrdiff_t block_stride,
                        const std::uint16_t* offsets, std::uint8_t* to, std::ptrdiff_t out_stride) {
    const auto offset = load_words<V>(reinterpret_cast<const std::uint8_t*>(offsets));
    const auto low_nibbles = V::broadcast16(0x0f0f);
    typename V::Vec bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = V::load_lanes(blocks, block_stride, i);
    transpose_lanes<V>(bytes);
    for (int i = 0; i < 16; ++i) {
        const auto low = V::bit_and(bytes[i], low_nibbles);
        const auto high = V::bit_and(V::template shift_right16<4>(bytes[i]), low_nibbles);
        store_words<V>(to, decode_codes<V>(low, offset));
        store_words<V>(to + out_stride, decode_codes<V>(high, offset));
        to += 2 * out_stride;
    }
}

template <class V>
void decode_transposed(const PackedView& in, const MatrixSink& out) {
    // Four blocks of a row share a cache line, so they are taken together; more would spread the
    // stores over more pages than the first-level address cache holds.
    constexpr std::ptrdiff_t kTogether = 4;
    for (std::ptrdiff_t start = 0; start < in.groups; start += kTogether) {
        const std::ptrdiff_t end = start + kTogether < in.groups ? start + kTogether : in.groups;
        for (std::ptrdiff_t row = 0; row < in.rows;) {
            // The last tile overlaps the one before it; fewer rows than a tile take exact code.
            const std::ptrdiff_t left = in.rows - row;
            const bool whole = in.rows >= V::kBytes;
            const std::ptrdiff_t first = whole && left < V::kBytes ? in.rows - V::kBytes : row;
            const std::ptrdiff_t count = whole ? V::kBytes : in.rows;
            for (std::ptrdiff_t block = start; block < end; ++block) {
                alignas(64) std::uint16_t offsets[V::kBytes];
                const std::uint8_t* scales = in.scales + first * in.scale_stride + block;
                if (whole && gather_offsets<V>(scales, in.scale_stride, offsets)) {
                    decode_tile<V>(in.blocks + first * in.block_stride + block * kBlockBytes,
                                   in.block_stride, offsets,
                                   out.data + block * kBlockValues * out.stride + first * 2,
                                   out.stride);
                } else {
                    decode_transposed_rows(in, out, block, first, count);
                }
            }
            row = first + count;
        }
    }
}

// One block to 64 bytes; Lane is a vector type of a single lane.
template <class Lane>
inline void decode_block(const std::uint8_t* block, unsigned scale, std::uint8_t* to) {
    const auto low_nibbles = Lane::broadcast16(0x0f0f);
    const auto offset = Lane::broadcast16(exponent_offset(scale));
    const auto bytes = Lane::load(block);
    const auto low = Lane::bit_and(bytes, low_nibbles);
    const auto high = Lane::bit_and(Lane::template shift_right16<4>(bytes), low_nibbles);
    store_words<Lane>(to, decode_codes<Lane>(Lane::interleave_low8(low, high), {offset, offset}));
    store_words<Lane>(to + 2 * Lane::kBytes,
                      decode_codes<Lane>(Lane::interleave_high8(low, high), {offset, offset}));
}

template <class Lane>
void decode(const PackedView& in, const MatrixSink& out) {
    for (std::ptrdiff_t row = 0; row < in.rows; ++row) {
        const std::uint8_t* blocks = in.blocks + row * in.block_stride;
        const std::uint8_t* scales = in.scales + row * in.scale_stride;
        std::uint8_t* to = out.data + row * out.stride;
        for (std::ptrdiff_t block = 0; block < in.groups; ++block) {
            const unsigned scale = scales[block];
            if (scale >= kLeastFastScale && scale <= kLargestFastScale) {
                decode_block<Lane>(blocks, scale, to);
            } else {
                decode_block_exactly(blocks, scale, to);
            }
            blocks += kBlockBytes;
            to += 2 * kBlockValues;
        }
    }
}

}  // namespace
}  // namespace moe_surgery::mxfp4

#include "vector_encode.inl"
