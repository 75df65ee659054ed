// The AVX2 kernels. The instructions are switched on for this file alone, before any include.
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernel_sets.hpp"
#include "lane_x86.inl"
#include "vector_kernels.inl"

namespace moe_surgery::mxfp4 {
namespace {

struct Avx2 {
    using Vec = __m256i;
    using Sums = __m256d;
    static constexpr std::ptrdiff_t kBytes = 32;

    static Vec zero() { return _mm256_setzero_si256(); }
    static Vec load(const std::uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const Vec*>(from));
    }
    static void store(std::uint8_t* to, Vec x) { _mm256_storeu_si256(reinterpret_cast<Vec*>(to), x); }
    static Vec broadcast16(unsigned x) { return _mm256_set1_epi16(static_cast<short>(x)); }
    static Vec broadcast_lane(const std::uint8_t* from) {
        return _mm256_broadcastsi128_si256(LaneX86::load(from));
    }

    static Vec load_lanes(const std::uint8_t* base, std::ptrdiff_t stride, int position) {
        const __m128i low = LaneX86::load(base + column_of<Avx2>(position, 0) * stride);
        const __m128i high = LaneX86::load(base + column_of<Avx2>(position, 1) * stride);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    static void store_lanes(std::uint8_t* base, std::ptrdiff_t stride, int position, Vec x) {
        LaneX86::store(base + column_of<Avx2>(position, 0) * stride, _mm256_castsi256_si128(x));
        LaneX86::store(base + column_of<Avx2>(position, 1) * stride, _mm256_extracti128_si256(x, 1));
    }

    static Vec bit_and(Vec a, Vec b) { return _mm256_and_si256(a, b); }
    static Vec bit_or(Vec a, Vec b) { return _mm256_or_si256(a, b); }
    static Vec or_difference(Vec so_far, Vec a, Vec b) {
        return _mm256_or_si256(so_far, _mm256_xor_si256(a, b));
    }
    template <int N>
    static Vec shift_right16(Vec x) { return _mm256_srli_epi16(x, N); }
    template <int N>
    static Vec shift_left16(Vec x) { return _mm256_slli_epi16(x, N); }
    static Vec interleave_low8(Vec a, Vec b) { return _mm256_unpacklo_epi8(a, b); }
    static Vec interleave_high8(Vec a, Vec b) { return _mm256_unpackhi_epi8(a, b); }
    static Vec interleave_low16(Vec a, Vec b) { return _mm256_unpacklo_epi16(a, b); }
    static Vec interleave_high16(Vec a, Vec b) { return _mm256_unpackhi_epi16(a, b); }
    static Vec pack16(Vec first, Vec second) { return _mm256_packus_epi16(first, second); }
    static Vec lookup(Vec table, Vec codes) { return _mm256_shuffle_epi8(table, codes); }

    static Vec max_u16(Vec a, Vec b) { return _mm256_max_epu16(a, b); }
    static Vec min_u16(Vec a, Vec b) { return _mm256_min_epu16(a, b); }
    static Vec add16(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
    static Vec subtract_saturating_u16(Vec a, Vec b) { return _mm256_subs_epu16(a, b); }
    static Vec add_to_nonzero(Vec bits, Vec offset) {
        // Doubling drops the sign bit.
        const Vec zeros = _mm256_cmpeq_epi16(_mm256_add_epi16(bits, bits), zero());
        return _mm256_add_epi16(bits, _mm256_andnot_si256(zeros, offset));
    }
    // One more where 0 <= x < 2^15 is above the limit.
    template <int Limit>
    static Vec add_if_above(Vec code, Vec x) {
        return _mm256_sub_epi16(code, _mm256_cmpgt_epi16(x, broadcast16(Limit)));
    }

    static Vec subtract_f32(Vec a, Vec b) {
        return _mm256_castps_si256(_mm256_sub_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
    }
    static Sums no_sums() { return _mm256_setzero_pd(); }
    static void add_squared_f32(Sums& sums, Vec x) {
        const __m256 floats = _mm256_castsi256_ps(x);
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(floats));
        const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1));
        sums = _mm256_fmadd_pd(high, high, _mm256_fmadd_pd(low, low, sums));
    }
    static double total(Sums sums) {
        double parts[4];
        _mm256_storeu_pd(parts, sums);
        return (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
};

}  // namespace

const Kernels kAvx2Kernels = {"avx2", decode<LaneX86>, decode_transposed<Avx2>, encode_transposed<Avx2>};

}  // namespace moe_surgery::mxfp4

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
