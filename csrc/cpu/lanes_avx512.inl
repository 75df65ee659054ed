// Sixteen lanes in one register of AVX-512. `Vnni`: with its integer dot products.
namespace moe_surgery::cpu {
namespace {

template <bool Vnni>
struct LanesAvx512 {
    using F = __m512;
    using I = __m512i;
    struct Codes {
        __m512i plane[4];
    };
    static constexpr float kFactor = 1.0f;
    static constexpr int kRows = 5, kTokens = 4, kPackedRows = 4;

    static F zero() { return _mm512_setzero_ps(); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F f) { _mm512_storeu_ps(p, f); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F power_of_two(F n) {
        const I whole = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        return _mm512_castsi512_ps(_mm512_slli_epi32(whole, 23));
    }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

    static float sum(F f) {
        const __m256 low = _mm512_castps512_ps256(f);
        const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(f), 1));
        const __m256 eight = _mm256_add_ps(low, high);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }

    static F bf16(const std::uint8_t* p) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static void bf16_pairs(const std::uint8_t* p, F& even, F& odd) {
        const I bits = _mm512_loadu_si512(p);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }

    static Codes codes(const std::uint8_t* p) {
        return looked_up(_mm512_loadu_si512(p));
    }
    // Of so many blocks; zeros after them.
    static Codes codes_of(const std::uint8_t* p, int blocks) {
        return looked_up(_mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << (2 * blocks)) - 1), p));
    }
    // The index of `vpermw` has five bits: the table is there twice, so the fifth may be anything.
    static Codes looked_up(I packed) {
        alignas(64) static constexpr std::int16_t kDoubled[32] = {
            0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12,
            0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        const I table = _mm512_load_si512(kDoubled);
        return {{_mm512_permutexvar_epi16(packed, table),
                 _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4), table),
                 _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 8), table),
                 _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 12), table)}};
    }
    static I dot(const Codes& w, const std::int16_t* x, std::ptrdiff_t length) {
        I sums = _mm512_madd_epi16(w.plane[0], _mm512_loadu_si512(x));
        for (int k = 1; k < 4; ++k) {
            const I plane = _mm512_loadu_si512(x + k * length);
            if constexpr (Vnni) {
                sums = _mm512_dpwssd_epi32(sums, w.plane[k], plane);
            } else {
                sums = _mm512_add_epi32(sums, _mm512_madd_epi16(w.plane[k], plane));
            }
        }
        return sums;
    }
    static F scales(std::uint32_t four) {
        // Each byte to the top of its block's four lanes (0x80 gives zero), then down to the exponent.
        const I places = _mm512_set_epi32(0x03808080, 0x03808080, 0x03808080, 0x03808080, 0x02808080, 0x02808080,
                                          0x02808080, 0x02808080, 0x01808080, 0x01808080, 0x01808080, 0x01808080,
                                          0x00808080, 0x00808080, 0x00808080, 0x00808080);
        const I spread = _mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(four)), places);
        return _mm512_castsi512_ps(_mm512_srli_epi32(spread, 1));
    }
    static void store_rounded(std::int16_t* p, F f) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(f)));
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
