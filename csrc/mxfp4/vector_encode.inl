// BF16 to MXFP4 over a vector type V; included by vector_kernels.inl, see there.
#include "scale_search.inl"

namespace moe_surgery::mxfp4 {
namespace {

// Smallest exponent field of a block's maximum for which the rounding midpoints are normal too, also
// under the scale below.
constexpr unsigned kLeastFastExponent = 6;
constexpr unsigned kInfinityExponent = 255;

// What the columns of a tile need: their scales, the exponent offset of each, and what to subtract
// from a magnitude so that every column rounds at the same midpoints.
template <class V>
struct TileScales {
    alignas(64) std::uint16_t offsets[V::kBytes];
    alignas(64) std::uint16_t bases[V::kBytes];
    alignas(64) std::uint16_t scales[V::kBytes];
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

// The first scale of every column; false when one needs exact code: an infinity, a NaN or a subnormal
// midpoint. A column of zeros gets scale 0 here as there, and no other column does.
template <class V>
inline bool first_scales(const std::uint16_t* maxima, std::uint16_t* scales) {
    unsigned outside = 0;
    for (int i = 0; i < V::kBytes; ++i) {
        const unsigned exponent = maxima[i] >> 7;
        const bool zero = maxima[i] == 0;
        const bool fast = exponent >= kLeastFastExponent && exponent < kInfinityExponent;
        outside |= static_cast<unsigned>(!(zero | fast));
        scales[i] = static_cast<std::uint16_t>(zero ? 0 : exponent - 2);
    }
    return outside == 0;
}

// Whether some column's largest value is neither 4 nor 6 times its first scale: what came from MXFP4
// has no such column.
template <class V>
inline bool surely_inexact(const std::uint16_t* maxima) {
    unsigned fractions = 0;
    for (int i = 0; i < V::kBytes; ++i) fractions |= maxima[i];
    return (fractions & 0x3f) != 0;
}

// Offsets and bases of the scales. The base of a column of zeros is 0, so that its codes are zeros.
template <class V>
inline void apply_scales(TileScales<V>& tile) {
    for (int i = 0; i < V::kBytes; ++i) {
        const unsigned scale = tile.scales[i];
        tile.offsets[i] = exponent_offset(scale);
        tile.bases[i] = static_cast<std::uint16_t>(scale == 0 ? 0 : (scale - 3) << 7);
    }
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

// All rows of a tile into the bytes of its blocks, transposed.
template <class V>
inline void encode_rows(const std::uint8_t* from, std::ptrdiff_t stride, TileScales<V>& tile,
                        typename V::Vec (&bytes)[16], Decoded<V>& decoded, TileSums<V>& sums) {
    apply_scales<V>(tile);
    decoded.difference = {V::zero(), V::zero()};
    for (int i = 0; i < 16; ++i) {
        const auto low = encode_row<V>(from + 2 * i * stride, tile, 2 * i, decoded, sums);
        const auto high = encode_row<V>(from + (2 * i + 1) * stride, tile, 2 * i + 1, decoded, sums);
        bytes[i] = V::bit_or(low, V::template shift_left16<4>(high));
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
    if (!first_scales<V>(maxima, tile.scales)) return false;

    // A block that is exact under its first scale keeps it, so a tile of such blocks needs no search.
    const bool search_first = surely_inexact<V>(maxima);
    if (search_first) improve_scales<V>(from, stride, maxima, tile.scales);
    Decoded<V> decoded;
    typename V::Vec bytes[16];
    const TileSums<V> before = sums;
    encode_rows<V>(from, stride, tile, bytes, decoded, sums);
    int different = count_different<V>(decoded);
    if (!search_first && different != 0 && improve_scales<V>(from, stride, maxima, tile.scales)) {
        sums = before;
        encode_rows<V>(from, stride, tile, bytes, decoded, sums);
        different = count_different<V>(decoded);
    }
    if (different != 0) add_tile_error<V>(from, stride, decoded, sums.error);
    inexact += different;

    for (int i = 0; i < V::kBytes; ++i) scales[i * scale_stride] = static_cast<std::uint8_t>(tile.scales[i]);
    transpose_lanes<V>(bytes);
    for (int i = 0; i < 16; ++i) V::store_lanes(blocks, block_stride, i, bytes[i]);
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
