// The AVX-512 kernels. The instructions are switched on for this file alone, before any include.
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl")
// GCC takes the deliberately undefined operands inside its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernel_sets.hpp"
#include "lane_x86.inl"
#include "vector_kernels.inl"

namespace moe_surgery::mxfp4 {
namespace {

struct Avx512 {
    using Vec = __m512i;
    using Sums = __m512d;
    static constexpr std::ptrdiff_t kBytes = 64;

    static Vec zero() { return _mm512_setzero_si512(); }
    static Vec load(const std::uint8_t* from) { return _mm512_loadu_si512(from); }
    static void store(std::uint8_t* to, Vec x) { _mm512_storeu_si512(to, x); }
    static Vec broadcast16(unsigned x) { return _mm512_set1_epi16(static_cast<short>(x)); }
    static Vec broadcast_lane(const std::uint8_t* from) {
        return _mm512_broadcast_i32x4(LaneX86::load(from));
    }

    static Vec load_lanes(const std::uint8_t* base, std::ptrdiff_t stride, int position) {
        Vec x = _mm512_castsi128_si512(LaneX86::load(base + column_of<Avx512>(position, 0) * stride));
        x = _mm512_inserti32x4(x, LaneX86::load(base + column_of<Avx512>(position, 1) * stride), 1);
        x = _mm512_inserti32x4(x, LaneX86::load(base + column_of<Avx512>(position, 2) * stride), 2);
        return _mm512_inserti32x4(x, LaneX86::load(base + column_of<Avx512>(position, 3) * stride), 3);
    }
    static void store_lanes(std::uint8_t* base, std::ptrdiff_t stride, int position, Vec x) {
        LaneX86::store(base + column_of<Avx512>(position, 0) * stride, _mm512_castsi512_si128(x));
        LaneX86::store(base + column_of<Avx512>(position, 1) * stride, _mm512_extracti32x4_epi32(x, 1));
        LaneX86::store(base + column_of<Avx512>(position, 2) * stride, _mm512_extracti32x4_epi32(x, 2));
        LaneX86::store(base + column_of<Avx512>(position, 3) * stride, _mm512_extracti32x4_epi32(x, 3));
    }

    static Vec bit_and(Vec a, Vec b) { return _mm512_and_si512(a, b); }
    static Vec bit_or(Vec a, Vec b) { return _mm512_or_si512(a, b); }
    static Vec or_difference(Vec so_far, Vec a, Vec b) {
        return _mm512_ternarylogic_epi32(so_far, a, b, 0xf6);  // so_far | (a ^ b)
    }
    template <int N>
    static Vec shift_right16(Vec x) { return _mm512_srli_epi16(x, N); }
    template <int N>
    static Vec shift_left16(Vec x) { return _mm512_slli_epi16(x, N); }
    static Vec interleave_low8(Vec a, Vec b) { return _mm512_unpacklo_epi8(a, b); }
    static Vec interleave_high8(Vec a, Vec b) { return _mm512_unpackhi_epi8(a, b); }
    static Vec interleave_low16(Vec a, Vec b) { return _mm512_unpacklo_epi16(a, b); }
    static Vec interleave_high16(Vec a, Vec b) { return _mm512_unpackhi_epi16(a, b); }
    static Vec pack16(Vec first, Vec second) { return _mm512_packus_epi16(first, second); }
    static Vec lookup(Vec table, Vec codes) { return _mm512_shuffle_epi8(table, codes); }

    static Vec max_u16(Vec a, Vec b) { return _mm512_max_epu16(a, b); }
    static Vec min_u16(Vec a, Vec b) { return _mm512_min_epu16(a, b); }
    static Vec add16(Vec a, Vec b) { return _mm512_add_epi16(a, b); }
    static Vec subtract_saturating_u16(Vec a, Vec b) { return _mm512_subs_epu16(a, b); }
    static Vec add_to_nonzero(Vec bits, Vec offset) {
        const __mmask32 nonzero = _mm512_test_epi16_mask(bits, broadcast16(0x7fff));
        return _mm512_mask_add_epi16(bits, nonzero, bits, offset);
    }
    // One more where 0 <= x < 2^15 is above the limit.
    template <int Limit>
    static Vec add_if_above(Vec code, Vec x) {
        const __mmask32 above = _mm512_cmpgt_epi16_mask(x, broadcast16(Limit));
        return _mm512_mask_add_epi16(code, above, code, broadcast16(1));
    }

    static Vec subtract_f32(Vec a, Vec b) {
        return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
    }
    static Sums no_sums() { return _mm512_setzero_pd(); }
    static void add_squared_f32(Sums& sums, Vec x) {
        const __m256i high_half = _mm512_extracti64x4_epi64(x, 1);
        const __m512d low = _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_castsi512_si256(x)));
        const __m512d high = _mm512_cvtps_pd(_mm256_castsi256_ps(high_half));
        sums = _mm512_fmadd_pd(high, high, _mm512_fmadd_pd(low, low, sums));
    }
    static double total(Sums sums) {
        double parts[8];
        _mm512_storeu_pd(parts, sums);
        return ((parts[0] + parts[1]) + (parts[2] + parts[3])) +
               ((parts[4] + parts[5]) + (parts[6] + parts[7]));
    }
};

}  // namespace

const Kernels kAvx512Kernels = {"avx512", decode<LaneX86>, decode_transposed<Avx512>,
                                encode_transposed<Avx512>};

}  // namespace moe_surgery::mxfp4

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
