// Sixteen lanes in two registers of AVX2.
namespace moe_surgery::cpu {
namespace {

struct LanesAvx2 {
    struct F {
        __m256 low, high;
    };
    struct I {
        __m256i low, high;
    };
    // 32 bytes of codes as four planes of 16 words, each 256 times the doubled weight; twice.
    struct Codes {
        __m256i plane[2][4];
    };
    static constexpr float kFactor = 1.0f / 256;
    static constexpr int kRows = 2, kTokens = 2, kPackedRows = 2;

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F f) {
        _mm256_storeu_ps(p, f.low);
        _mm256_storeu_ps(p + 8, f.high);
    }
    static F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
    static F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
    static F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
    static F fma(F a, F b, F c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static F round(F a) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
    }
    static F power_of_two(F n) { return {power(n.low), power(n.high)}; }
    static F to_float(I x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

    static float sum(F f) {
        const __m256 eight = _mm256_add_ps(f.low, f.high);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }

    static F bf16(const std::uint8_t* p) { return {half(p), half(p + 16)}; }
    static void bf16_pairs(const std::uint8_t* p, F& even, F& odd) {
        const __m256i low = bytes(p), high = bytes(p + 32);
        const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        even = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
        odd = {_mm256_castsi256_ps(_mm256_and_si256(low, top)), _mm256_castsi256_ps(_mm256_and_si256(high, top))};
    }

    static Codes codes(const std::uint8_t* p) {
        Codes found;
        some_codes(p, found.plane[0]);
        some_codes(p + 32, found.plane[1]);
        return found;
    }
    // Of so many blocks; zeros after them.
    static Codes codes_of(const std::uint8_t* p, int blocks) {
        std::uint8_t held[4 * kBlockBytes] = {};
        for (int i = 0; i < blocks; ++i) __builtin_memcpy(held + i * kBlockBytes, p + i * kBlockBytes, kBlockBytes);
        return codes(held);
    }
    static I dot(const Codes& w, const std::int16_t* x, std::ptrdiff_t length) {
        return {some_dot(w.plane[0], x, length), some_dot(w.plane[1], x + 16, length)};
    }
    static F scales(std::uint32_t four) {
        const __m256i all = _mm256_set1_epi32(static_cast<int>(four));
        // Each byte to the top of its block's four lanes (0x80 gives zero), then down to the exponent.
        const __m256i first = _mm256_set_epi32(0x01808080, 0x01808080, 0x01808080, 0x01808080, 0x00808080,
                                               0x00808080, 0x00808080, 0x00808080);
        const __m256i second = _mm256_set_epi32(0x03808080, 0x03808080, 0x03808080, 0x03808080, 0x02808080,
                                                0x02808080, 0x02808080, 0x02808080);
        return {_mm256_castsi256_ps(_mm256_srli_epi32(_mm256_shuffle_epi8(all, first), 1)),
                _mm256_castsi256_ps(_mm256_srli_epi32(_mm256_shuffle_epi8(all, second), 1))};
    }
    static void store_rounded(std::int16_t* p, F f) {
        const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(f.low), _mm256_cvtps_epi32(f.high));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
    }

  private:
    static __m256i bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static __m256 half(const std::uint8_t* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static __m256 power(__m256 n) {
        const __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(whole, 23));
    }
    static void some_codes(const std::uint8_t* p, __m256i (&plane)[4]) {
        const __m256i table = _mm256_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12,  //
                                               0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
        const __m256i packed = bytes(p), nibble = _mm256_set1_epi8(15);
        const __m256i top = _mm256_set1_epi16(static_cast<short>(0xff00));
        const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, nibble));
        const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble));
        plane[0] = _mm256_slli_epi16(low, 8);
        plane[1] = _mm256_slli_epi16(high, 8);
        plane[2] = _mm256_and_si256(low, top);
        plane[3] = _mm256_and_si256(high, top);
    }
    // Eight products of at most 256 * 12 * 32767 a lane: within 32 bits.
    static __m256i some_dot(const __m256i (&plane)[4], const std::int16_t* x, std::ptrdiff_t length) {
        __m256i sums = _mm256_madd_epi16(plane[0], bytes(x));
        for (int k = 1; k < 4; ++k) {
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(plane[k], bytes(x + k * length)));
        }
        return sums;
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
