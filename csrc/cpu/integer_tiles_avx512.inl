// Matrices into tiles of integers and sums out of them, in AVX-512: everything but the products.
#pragma once

#include "integer_tiles.hpp"
#include "tiles_avx512.inl"

namespace moe_surgery::cpu {
namespace {

struct IntegerLayout {
    static void columns(const float* const* x, std::ptrdiff_t tokens, std::ptrdiff_t first, std::ptrdiff_t last, float* out) {
        for (std::ptrdiff_t c = first; c < last; c += kLanes, out += kLanes * kTileTokens) {
            __m512i values[16];
            for (std::ptrdiff_t n = 0; n < kTileTokens; ++n) {
                values[n] = n < tokens ? _mm512_loadu_si512(x[n] + c) : _mm512_setzero_si512();
            }
            TileLayout::transpose(values);
            for (std::ptrdiff_t k = 0; k < kLanes; ++k) _mm512_storeu_si512(out + k * kTileTokens, values[k]);
        }
    }

    static void quantize(const float* columns, std::ptrdiff_t count, SplitQuads* out, float* factors) {
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        __m512i largest = _mm512_setzero_si512();  // of the bits: more than all others for what is not finite
        for (std::ptrdiff_t c = 0; c < count; ++c) {
            largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_loadu_si512(columns + c * kTileTokens), magnitude));
        }
        const __m512 most = _mm512_set1_ps(kQuantMax), absmax = _mm512_castsi512_ps(largest);
        const __mmask16 finite = _mm512_cmplt_epi32_mask(largest, _mm512_set1_epi32(0x7f800000));
        // Below this the inverse would overflow; such values count as zeros.
        const __mmask16 counts = finite & _mm512_cmp_ps_mask(absmax, _mm512_set1_ps(1e-30f), _CMP_GE_OQ);
        const __m512 scale = _mm512_maskz_div_ps(counts, most, absmax);
        const __m512 unit = _mm512_maskz_div_ps(counts, absmax, most);
        _mm512_storeu_ps(factors, _mm512_mask_blend_ps(finite, _mm512_set1_ps(from_bits(0x7fc00000u)), unit));
        const __m512i byte = _mm512_set1_epi32(255), half = _mm512_set1_epi32(128);
        for (std::ptrdiff_t c = 0; c < tiles_of(count, kIntegerColumns) * kIntegerColumns; c += 4) {
            __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
            for (int i = 0; i < 4 && c + i < count; ++i) {
                const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(columns + (c + i) * kTileTokens), scale);
                const __m512i integer = _mm512_cvtps_epi32(value);
                const __m512i upper = _mm512_and_si512(_mm512_srai_epi32(_mm512_add_epi32(integer, half), 8), byte);
                const __m512i lower = _mm512_and_si512(integer, byte);
                const auto shift = static_cast<unsigned>(8 * i);
                high = _mm512_or_si512(high, _mm512_slli_epi32(upper, shift));
                low = _mm512_or_si512(low, _mm512_slli_epi32(lower, shift));
            }
            SplitQuads& tile = out[c / kIntegerColumns];
            _mm512_store_si512(tile.high.quads[c % kIntegerColumns / 4], high);
            _mm512_store_si512(tile.low.quads[c % kIntegerColumns / 4], low);
        }
    }

    // Doubled values of the codes times 2^0 to 2^3, and zeros, in both halves of 32 bytes.
    struct alignas(64) Tables {
        std::int8_t values[5][32];

        constexpr Tables() : values() {
            constexpr int kDoubled[8] = {0, 1, 2, 3, 4, 6, 8, 12};
            for (int shift = 0; shift < 4; ++shift) {
                for (int i = 0; i < 32; ++i) {
                    const int value = kDoubled[i % 8] << shift;
                    values[shift][i] = static_cast<std::int8_t>(i & 8 ? -value : value);
                }
            }
        }
    };
    static constexpr int kZeros = 4;

    static std::uint64_t codes(const Mxfp4Rows& weight, std::ptrdiff_t row, std::ptrdiff_t first, std::ptrdiff_t last, int band,
                               std::ptrdiff_t into, CodeTile* out, float* factor) {
        static constexpr Tables kTables;
        const std::ptrdiff_t count = last - first;
        const std::uint8_t* bytes = weight.blocks + row * weight.block_stride + first * kBlockBytes;
        TileLayout::prefetch_row(bytes + 4 * kTileRows * weight.block_stride, count * kBlockBytes);
        const __mmask16 some = TileLayout::mask_of(count);
        const __m128i scales = _mm_maskz_loadu_epi8(some, weight.scales + row * weight.scale_stride + first);
        const int largest = largest_byte(scales);
        const __m128i below = _mm_subs_epu8(_mm_set1_epi8(static_cast<char>(largest)), scales);
        const __m128i bands = _mm_and_si128(_mm_srli_epi16(below, 2), _mm_set1_epi8(63));
        const __m128i shifts = _mm_andnot_si128(below, _mm_set1_epi8(3));  // 3 - below % 4
        const __mmask16 here = _mm_mask_cmpeq_epi8_mask(some, bands, _mm_set1_epi8(static_cast<char>(band)));
        alignas(16) std::uint8_t tables[kSegmentBlocks];
        _mm_store_si128(reinterpret_cast<__m128i*>(tables), _mm_mask_blend_epi8(here, _mm_set1_epi8(kZeros), shifts));
        const __m512i nibbles = _mm512_set1_epi8(15);
        for (std::ptrdiff_t b = 0; b < count; b += 2, ++out) {
            const bool pair = b + 1 < count;
            const __m256i packed = _mm256_maskz_loadu_epi8(pair ? 0xffffffffu : 0xffffu, bytes + b * kBlockBytes);
            const __m512i wide = _mm512_cvtepu8_epi16(packed);
            const __m512i indices = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), nibbles);
            const __m512i values = _mm512_inserti64x4(_mm512_castsi256_si512(table(kTables, tables[b])),
                                                      table(kTables, pair ? tables[b + 1] : kZeros), 1);
            _mm512_store_si512(out->rows[into], _mm512_shuffle_epi8(values, indices));
        }
        *factor = power_of_two(largest - 3 - 4 * band - 128);
        return band == 0 && here != some ? bands_of(bytes, bands, count) : 0;
    }

    static __m256i table(const Tables& tables, int which) {
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(tables.values[which]));
    }

    static int largest_byte(__m128i bytes) {
        bytes = _mm_max_epu8(bytes, _mm_srli_si128(bytes, 8));
        bytes = _mm_max_epu8(bytes, _mm_srli_si128(bytes, 4));
        bytes = _mm_max_epu8(bytes, _mm_srli_si128(bytes, 2));
        bytes = _mm_max_epu8(bytes, _mm_srli_si128(bytes, 1));
        return _mm_cvtsi128_si32(bytes) & 255;
    }

    static float power_of_two(int exponent) {
        if (exponent >= -126) return from_bits(static_cast<std::uint32_t>(exponent + 127) << 23);
        return exponent >= -149 ? from_bits(std::uint32_t{1} << (exponent + 149)) : 0.0f;
    }

    // Of `count` blocks of codes, the bands of those that are not zeros.
    static std::uint64_t bands_of(const std::uint8_t* bytes, __m128i bands, std::ptrdiff_t count) {
        alignas(16) std::uint8_t numbers[kSegmentBlocks];
        _mm_store_si128(reinterpret_cast<__m128i*>(numbers), bands);
        std::uint64_t found = 0;
        for (std::ptrdiff_t b = 0; b < count; ++b) {
            const __m128i block = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + b * kBlockBytes));
            const __m128i magnitudes = _mm_and_si128(block, _mm_set1_epi8(0x77));
            if (_mm_test_epi8_mask(magnitudes, magnitudes)) found |= std::uint64_t{1} << numbers[b];
        }
        return found;
    }

    // sums = or += (256 high + low) * row_factors * token_factors.
    static void add(const std::int32_t (*high)[kTileTokens], const std::int32_t (*low)[kTileTokens], const float* row_factors,
                    __m512 token_factors, bool first, SumTile& sums) {
        const __m512 radix = _mm512_set1_ps(256.0f);
        for (std::ptrdiff_t r = 0; r < kTileRows; ++r) {
            const __m512 h = _mm512_cvtepi32_ps(_mm512_load_si512(high[r])), l = _mm512_cvtepi32_ps(_mm512_load_si512(low[r]));
            const __m512 value = _mm512_mul_ps(_mm512_fmadd_ps(h, radix, l), _mm512_set1_ps(row_factors[r]));
            const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(sums.rows[r]);
            _mm512_store_ps(sums.rows[r], _mm512_fmadd_ps(value, token_factors, before));
        }
    }

    static void swiglu(const SumTile* sums, std::ptrdiff_t stride, std::ptrdiff_t rows, const float* bias, const Swiglu& function,
                       float* out) {
        for (std::ptrdiff_t c = 0; c < kTileColumns; ++c) {
            _mm512_storeu_ps(out + c * kTileTokens, TileLayout::activations(sums, stride, rows, bias, function, 2 * c));
        }
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
