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
// Smallest exponent field of a block's maximum for which the rounding midpoints are normal too.
constexpr unsigned kLeastFastExponent = 5;
constexpr unsigned kInfinityExponent = 255;

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

// What the columns of a tile need: their scales, the exponent offset of each, and what to subtract
// from a magnitude so that every column rounds at the same midpoints.
template <class V>
struct TileScales {
    alignas(64) std::uint16_t offsets[V::kBytes];
    alignas(64) std::uint16_t bases[V::kBytes];
    std::uint8_t scales[V::kBytes];
};

template <class V>
inline void column_maxima(const std::uint8_t* from, std::ptrdiff_t stride, std::uint16_t* maxima) {
    const auto magnitude = V::broadcast16(0x7fff);
    WordPair<V> largest = {V::zero(), V::zero()};
    for (int row = 0; row < kBlockValues; ++row, from += stride) {
        const auto words = load_words<V>(from);
        largest.first = V::max_u16(largest.first, V::bit_and(words.first, magnitude));
        largest.second = V::max_u16(largest.second, V::bit_and(words.second, magnitude));
    }
    store_words<V>(reinterpret_cast<std::uint8_t*>(maxima), largest);
}

// False when a column needs exact code: an infinity, a NaN or a subnormal midpoint. A column of
// zeros gets scale 0 here as there; its base is 0, so that its codes are zeros.
template <class V>
inline bool choose_scales(const std::uint16_t* maxima, TileScales<V>& tile) {
    unsigned outside = 0;
    for (int i = 0; i < V::kBytes; ++i) {
        const unsigned exponent = maxima[i] >> 7;
        const bool zero = maxima[i] == 0;
        const bool fast = exponent >= kLeastFastExponent && exponent < kInfinityExponent;
        outside |= static_cast<unsigned>(!(zero | fast));
        const unsigned scale = zero ? 0 : exponent - 2;
        tile.scales[i] = static_cast<std::uint8_t>(scale);
        tile.offsets[i] = exponent_offset(scale);
        tile.bases[i] = static_cast<std::uint16_t>(zero ? 0 : (scale - 3) << 7);
    }
    return outside == 0;
}

// BF16 bits to codes. After `base` is subtracted, the exponent field 3 + e means 2^e, and a lower
// one is below the first midpoint. Ties go to even codes, so every other midpoint is exclusive.
template <class V>
inline typename V::Vec encode_words(typename V::Vec words, typename V::Vec base) {
    const auto relative =
        V::subtract_saturating_u16(V::bit_and(words, V::broadcast16(0x7fff)), base);
    auto code = V::bit_and(V::template shift_right16<12>(words), V::broadcast16(8));
    code = V::template add_if_above<0x080>(code, relative);  // 0.25
    code = V::template add_if_above<0x13f>(code, relative);  // 0.75, inclusive
    code = V::template add_if_above<0x1a0>(code, relative);  // 1.25
    code = V::template add_if_above<0x1df>(code, relative);  // 1.75, inclusive
    code = V::template add_if_above<0x220>(code, relative);  // 2.5
    code = V::template add_if_above<0x25f>(code, relative);  // 3.5, inclusive
    return V::template add_if_above<0x2a0>(code, relative);  // 5
}

// Sums of squares of BF16 values, in float64; `Sums` are V's partial sums.
template <class V>
inline void add_squares(typename V::Sums& sums, typename V::Vec words) {
    const auto zero = V::zero();
    V::add_squared_f32(sums, V::interleave_low16(zero, words));
    V::add_squared_f32(sums, V::interleave_high16(zero, words));
}

template <class V>
inline void add_squared_differences(typename V::Sums& sums, typename V::Vec a, typename V::Vec b) {
    const auto zero = V::zero();
    V::add_squared_f32(sums, V::subtract_f32(V::interleave_low16(zero, a), V::interleave_low16(zero, b)));
    V::add_squared_f32(sums, V::subtract_f32(V::interleave_high16(zero, a), V::interleave_high16(zero, b)));
}

// No member initialisers here or below: GCC compiles implicit constructors without the pragma.
template <class V>
struct TileSums {
    typename V::Sums error;
    typename V::Sums norm;
};

// What the tile's values decode to again, and in which bits each column differs from them.
template <class V>
struct Decoded {
    alignas(64) std::uint8_t words[kBlockValues][2 * V::kBytes];
    WordPair<V> difference;
};

// Encode one row of the tile into codes; remember what they decode to.
template <class V>
inline typename V::Vec encode_row(const std::uint8_t* from, const TileScales<V>& tile, int row,
                                  Decoded<V>& decoded, TileSums<V>& sums) {
    const auto base = load_words<V>(reinterpret_cast<const std::uint8_t*>(tile.bases));
    const auto offset = load_words<V>(reinterpret_cast<const std::uint8_t*>(tile.offsets));
    const auto words = load_words<V>(from);
    const auto codes =
        V::pack16(encode_words<V>(words.first, base.first), encode_words<V>(words.second, base.second));
    const auto back = decode_codes<V>(codes, offset);
    store_words<V>(decoded.words[row], back);
    decoded.difference.first = V::or_difference(decoded.difference.first, words.first, back.first);
    decoded.difference.second = V::or_difference(decoded.difference.second, words.second, back.second);
    add_squares<V>(sums.norm, words.first);
    add_squares<V>(sums.norm, words.second);
    return codes;
}

template <class V>
inline int count_different(const Decoded<V>& decoded) {
    alignas(64) std::uint16_t columns[V::kBytes];
    store_words<V>(reinterpret_cast<std::uint8_t*>(columns), decoded.difference);
    int count = 0;
    for (int i = 0; i < V::kBytes; ++i) count += columns[i] != 0;
    return count;
}

template <class V>
inline void add_tile_error(const std::uint8_t* from, std::ptrdiff_t stride, const Decoded<V>& decoded,
                           typename V::Sums& sums) {
    for (int row = 0; row < kBlockValues; ++row, from += stride) {
        const auto words = load_words<V>(from);
        const auto back = load_words<V>(decoded.words[row]);
        add_squared_differences<V>(sums, words.first, back.first);
        add_squared_differences<V>(sums, words.second, back.second);
    }
}

// 32 rows of V::kBytes columns to as many blocks; false, with nothing done, if exact code must.
template <class V>
inline bool encode_tile(const std::uint8_t* from, std::ptrdiff_t stride, std::uint8_t* blocks,
                        std::ptrdiff_t block_stride, std::uint8_t* scales, std::ptrdiff_t scale_stride,
                        TileSums<V>& sums, std::int64_t& inexact) {
    alignas(64) std::uint16_t maxima[V::kBytes];
    TileScales<V> tile;
    column_maxima<V>(from, stride, maxima);
    if (!choose_scales<V>(maxima, tile)) return false;
    for (int i = 0; i < V::kBytes; ++i) scales[i * scale_stride] = tile.scales[i];

    Decoded<V> decoded;
    decoded.difference = {V::zero(), V::zero()};
    typename V::Vec bytes[16];
    for (int i = 0; i < 16; ++i) {
        const auto low = encode_row<V>(from + 2 * i * stride, tile, 2 * i, decoded, sums);
        const auto high = encode_row<V>(from + (2 * i + 1) * stride, tile, 2 * i + 1, decoded, sums);
        bytes[i] = V::bit_or(low, V::template shift_left16<4>(high));
    }
    transpose_lanes<V>(bytes);
    for (int i = 0; i < 16; ++i) V::store_lanes(blocks, block_stride, i, bytes[i]);

    const int different = count_different<V>(decoded);
    if (different != 0) add_tile_error<V>(from, stride, decoded, sums.error);
    inexact += different;
    return true;
}

template <class V>
EncodeReport encode_transposed(const MatrixView& in, const PackedSink& out) {
    EncodeReport report;
    TileSums<V> sums = {V::no_sums(), V::no_sums()};
    for (std::ptrdiff_t block = 0; block < out.groups; ++block) {
        const std::uint8_t* from = in.data + block * kBlockValues * in.stride;
        std::uint8_t* blocks = out.blocks + block * kBlockBytes;
        std::uint8_t* scales = out.scales + block;
        std::ptrdiff_t row = 0;
        for (; out.rows - row >= V::kBytes; row += V::kBytes) {
            const bool done = encode_tile<V>(from + row * 2, in.stride, blocks + row * out.block_stride,
                                             out.block_stride, scales + row * out.scale_stride,
                                             out.scale_stride, sums, report.inexact_blocks);
            if (!done) encode_transposed_rows(in, out, block, row, V::kBytes, report);
        }
        encode_transposed_rows(in, out, block, row, out.rows - row, report);
    }
    report.error_sq += V::total(sums.error);
    report.norm_sq += V::total(sums.norm);
    return report;
}

}  // namespace
}  // namespace moe_surgery::mxfp4
