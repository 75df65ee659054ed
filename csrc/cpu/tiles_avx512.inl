// Matrices into tiles and sums out of them, in AVX-512 with BF16: everything but the products.
#pragma once

#include "elementwise.inl"
#include "tiles.hpp"

namespace moe_surgery::cpu {
namespace {

struct TileLayout {
    using Lanes = LanesAvx512<true>;

    // Word c of vector r becomes word r of vector c: 16 x 16 words of four bytes.
    static void transpose(__m512i (&v)[16]) {
        __m512i t[16];
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        // v[4 r + c], in each 128 bits q: words 4 q + c of vectors 4 r to 4 r + 3.
        for (int c = 0; c < 4; ++c) {
            t[c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);
            t[4 + c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
            t[8 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
            t[12 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
        }
        for (int c = 0; c < 4; ++c) {
            v[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
            v[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
            v[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
            v[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
        }
    }

    // Sixteen floats rounded to BF16, as floats.
    static __m512 rounded(__m512 x) {
        const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }

    // Each lane's pair of values, rounded to BF16.
    static __m512i rounded_pairs(__m512 a, __m512 b) {
        alignas(64) static constexpr std::uint16_t kInterleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
        return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), both);
    }
    // What the rounded `pairs` leave of the values, rounded.
    static __m512i rest_pairs(__m512 a, __m512 b, __m512i pairs) {
        const __m512 a_high = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        const __m512 b_high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
        return rounded_pairs(_mm512_sub_ps(a, a_high), _mm512_sub_ps(b, b_high));
    }
    static void split_pairs(__m512 a, __m512 b, std::ptrdiff_t k, SplitTile& out) {
        const __m512i pairs = rounded_pairs(a, b);
        _mm512_store_si512(out.high.pairs[k], pairs);
        _mm512_store_si512(out.low.pairs[k], rest_pairs(a, b, pairs));
    }

    static void split(const float* const* x, std::ptrdiff_t tokens, std::ptrdiff_t columns, std::ptrdiff_t first,
                      std::ptrdiff_t last, SplitTile* out) {
        for (std::ptrdiff_t b = first; b < last; ++b, ++out) {
            const std::ptrdiff_t start = b * kTileColumns, left = columns - start;
            const __mmask16 low_half = mask_of(left), high_half = mask_of(left - kLanes);
            __m512i high[kTileTokens], low[kTileTokens];
            for (std::ptrdiff_t n = 0; n < kTileTokens; ++n) {
                if (n >= tokens) {
                    high[n] = low[n] = _mm512_setzero_si512();
                    continue;
                }
                const __m512 a = _mm512_maskz_loadu_ps(low_half, x[n] + start);
                const __m512 c = _mm512_maskz_loadu_ps(high_half, x[n] + start + kLanes);
                high[n] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(c, a));
                const __m512 a_left = _mm512_sub_ps(a, rounded(a)), c_left = _mm512_sub_ps(c, rounded(c));
                low[n] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(c_left, a_left));
            }
            transpose(high);
            transpose(low);
            for (std::ptrdiff_t k = 0; k < kTileColumns / 2; ++k) {
                _mm512_store_si512(out->high.pairs[k], high[k]);
                _mm512_store_si512(out->low.pairs[k], low[k]);
            }
        }
    }

    // The first `count` of sixteen.
    static __mmask16 mask_of(std::ptrdiff_t count) {
        return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
    }
    static __mmask32 mask32_of(std::ptrdiff_t count) {
        return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
    }

    static void clear_rows(std::ptrdiff_t from, std::ptrdiff_t tiles, WeightTile* out) {
        if (from == kTileRows) return;
        for (std::ptrdiff_t b = 0; b < tiles; ++b) {
            for (std::ptrdiff_t r = from; r < kTileRows; ++r) _mm512_store_si512(out[b].rows[r], _mm512_setzero_si512());
        }
    }

    // BF16 of the values of MXFP4, twice: codes are looked up by five bits, of which the highest is not theirs.
    static __m512i mxfp4_table() {
        alignas(64) static constexpr std::uint16_t kTable[32] = {
            0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,  // 0, 0.5, 1, 1.5, 2, 3, 4, 6
            0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,
            0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
            0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
        return _mm512_load_si512(kTable);
    }

    // The table times 2^(scale - 127), for scales near the ends, where exponents overflow.
    static __m512i scaled_table(std::uint8_t scale) {
        alignas(64) std::uint16_t table[32];
        _mm512_store_si512(table, mxfp4_table());
        const float factor = from_bits(scale ? static_cast<std::uint32_t>(scale) << 23 : 0x00400000u);
        for (std::uint16_t& bits : table) {
            const float value = from_bits(static_cast<std::uint32_t>(bits) << 16) * factor;
            std::uint32_t all;
            __builtin_memcpy(&all, &value, sizeof all);
            bits = static_cast<std::uint16_t>(all >> 16);
        }
        return _mm512_load_si512(table);
    }

    static void mxfp4(const Mxfp4Rows& weight, std::ptrdiff_t row, std::ptrdiff_t rows, std::ptrdiff_t first,
                      std::ptrdiff_t last, WeightTile* out) {
        const __m512i table = mxfp4_table();
        constexpr __mmask32 kNotZero = 0xfefefefeu;  // entries whose exponent counts
        for (std::ptrdiff_t r = 0; r < rows; ++r) {
            const std::uint8_t* codes = weight.blocks + (row + r) * weight.block_stride;
            const std::uint8_t* scales = weight.scales + (row + r) * weight.scale_stride;
            // The rows of the panel after the next are read from memory meanwhile.
            const std::uint8_t* ahead = codes + 4 * kTileRows * weight.block_stride;
            for (std::ptrdiff_t b = first; b < last; ++b) {
                if (b % 4 == 0) prefetch(ahead + b * kBlockBytes);
                const unsigned scale = scales[b];
                __m512i scaled;
                if (scale - 2 <= 250) {
                    const auto exponent = static_cast<std::int16_t>((static_cast<int>(scale) - 127) * 128);
                    scaled = _mm512_mask_add_epi16(table, kNotZero, table, _mm512_set1_epi16(exponent));
                } else {
                    scaled = scaled_table(static_cast<std::uint8_t>(scale));
                }
                const __m512i bytes = _mm512_cvtepu8_epi32(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + b * kBlockBytes)));
                // Of each pair the low nibble's word, then the high one's; lookups ignore the other bits.
                const __m512i indices = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
                _mm512_store_si512(out[b - first].rows[r], _mm512_permutexvar_epi16(indices, scaled));
            }
        }
        clear_rows(rows, last - first, out);
    }

    static void dense(const DenseRows& weight, std::ptrdiff_t row, std::ptrdiff_t rows, std::ptrdiff_t first,
                      std::ptrdiff_t last, WeightTile* out) {
        for (std::ptrdiff_t r = 0; r < rows; ++r) {
            const std::uint8_t* values = weight.data + (row + r) * weight.stride;
            const std::uint8_t* ahead = values + 4 * kTileRows * weight.stride;
            for (std::ptrdiff_t b = first; b < last; ++b) {
                const std::ptrdiff_t start = b * kTileColumns;
                prefetch(ahead + 2 * start);
                const __mmask32 all = mask32_of(weight.columns - start);
                _mm512_store_si512(out[b - first].rows[r], _mm512_maskz_loadu_epi16(all, values + 2 * start));
            }
        }
        clear_rows(rows, last - first, out);
    }

    static void q8_0(const DenseRows& weight, const std::uint8_t* row, std::ptrdiff_t first, std::ptrdiff_t last, bool rest,
                     std::ptrdiff_t into, WeightTile* out) {
        const std::ptrdiff_t count = last - first;
        if (!row) {
            for (std::ptrdiff_t b = 0; b < count; ++b) _mm512_store_si512(out[b].rows[into], _mm512_setzero_si512());
            return;
        }
        prefetch_row(row + 4 * kTileRows * weight.stride + first * kBlock, count * kBlock);
        // Word b of vector k: columns 2k and 2k + 1 of block b.
        __m512i pairs[kTileColumns / 2];
        const std::uint8_t* codes = row + first * kBlock;
        const __mmask16 some = mask_of(count);
        for (std::ptrdiff_t k = 0; k < kTileColumns / 2; ++k) {
            pairs[k] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, codes + 2 * count * k));
        }
        transpose(pairs);
        for (std::ptrdiff_t b = 0; b < count; ++b) {
            const __m512 scale = _mm512_set1_ps(f16_at(row + weight.columns, first + b));
            const auto values = [&](int shift) {
                const __m512i code = _mm512_srai_epi32(_mm512_slli_epi32(pairs[b], shift), 24);
                return _mm512_mul_ps(_mm512_cvtepi32_ps(code), scale);
            };
            const __m512 even = values(24), odd = values(16);
            const __m512i high = rounded_pairs(even, odd);
            _mm512_store_si512(out[b].rows[into], rest ? rest_pairs(even, odd, high) : high);
        }
    }

    static void prefetch_row(const std::uint8_t* from, std::ptrdiff_t nbytes) {
        for (std::ptrdiff_t line = 0; line < nbytes; line += 64) prefetch(from + line);
    }

    static void transposed(const DenseRows& weight, std::ptrdiff_t row, std::ptrdiff_t rows, std::ptrdiff_t first,
                           std::ptrdiff_t last, WeightTile* out) {
        const __mmask16 some = mask_of(rows);
        for (std::ptrdiff_t b = first; b < last; ++b, ++out) {
            __m512i pairs[kTileColumns / 2];
            for (std::ptrdiff_t k = 0; k < kTileColumns / 2; ++k) {
                const std::ptrdiff_t column = b * kTileColumns + 2 * k;
                const std::uint8_t* values = weight.data + column * weight.stride + 2 * row;
                const __mmask16 even = column < weight.columns ? some : 0, odd = column + 1 < weight.columns ? some : 0;
                pairs[k] = _mm512_or_si512(
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, values)),
                    _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, values + weight.stride)), 16));
            }
            transpose(pairs);
            for (std::ptrdiff_t r = 0; r < kTileRows; ++r) _mm512_store_si512(out->rows[r], pairs[r]);
        }
    }

    static void swiglu(const SumTile* sums, std::ptrdiff_t stride, std::ptrdiff_t rows, const float* bias,
                       const Swiglu& function, SplitTile* out) {
        for (std::ptrdiff_t k = 0; k < kTileColumns / 2; ++k) {
            const __m512 a = activations(sums, stride, rows, bias, function, 4 * k);
            const __m512 b = activations(sums, stride, rows, bias, function, 4 * k + 2);
            split_pairs(a, b, k, *out);
        }
    }

    // Of the gate in `row` and the up value after it, for all tokens.
    static __m512 activations(const SumTile* sums, std::ptrdiff_t stride, std::ptrdiff_t rows, const float* bias,
                              const Swiglu& function, std::ptrdiff_t row) {
        if (row >= rows) return _mm512_setzero_ps();
        const SumTile& tile = sums[row / kTileRows * stride];
        const __m512 gate = _mm512_add_ps(_mm512_load_ps(tile.rows[row % kTileRows]), _mm512_set1_ps(bias[row]));
        const __m512 up = _mm512_add_ps(_mm512_load_ps(tile.rows[row % kTileRows + 1]), _mm512_set1_ps(bias[row + 1]));
        return Elementwise<Lanes>::swiglu(gate, up, _mm512_set1_ps(function.limit), _mm512_set1_ps(function.alpha));
    }

    static void store(const SumTile& sums, std::ptrdiff_t rows, std::ptrdiff_t tokens, const float* bias,
                      const float* factors, float* const* out) {
        __m512i values[16];
        for (std::ptrdiff_t r = 0; r < kTileRows; ++r) values[r] = _mm512_load_si512(sums.rows[r]);
        transpose(values);
        const __mmask16 some = mask_of(rows);
        const __m512 biases = _mm512_maskz_loadu_ps(some, bias);
        for (std::ptrdiff_t n = 0; n < tokens; ++n) {
            const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(values[n]), biases);
            _mm512_mask_storeu_ps(out[n], some, _mm512_mul_ps(sum, _mm512_set1_ps(factors[n])));
        }
    }
};

template <class Products>
constexpr TileKernels tile_kernels_over(bool (*key_tiles)(const KeyRange&, std::ptrdiff_t, WeightTile*) = nullptr,
                                        void (*attend)(const AttentionPiece&, const AttentionScratch&) = nullptr,
                                        const IntegerKernels* integers = nullptr) {
    return {Products::begin,         Products::end,      TileLayout::split,    TileLayout::mxfp4,
            TileLayout::dense,       TileLayout::transposed, TileLayout::q8_0, Products::multiply, TileLayout::swiglu,
            TileLayout::store,       key_tiles,          attend,               integers};
}

}  // namespace
}  // namespace moe_surgery::cpu
