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
    // The codes of an ActBlock512's columns, still packed: decoded in halves, so that a half stays in registers.
    struct Packed {
        const std::uint8_t* from;
        std::uint8_t padded[kActBlockBytes];
        const std::uint8_t* bytes() const { return from ? from : padded; }
    };
    static constexpr int kRows = 2, kTokens = 2, kPackedRows = 1, kColumnRows = 1, kValueHeads = 1, kScoreVectors = 1;
    static constexpr int kWordRows = 2, kWordTokens = 2, kDecodedRows = 1, kDecodedTokens = 2;
    // Doubled weights plus 12, in the order of ActBlock512's vectors.
    struct Decoded {
        __m256i low[8], high[8];
    };

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

    // The sums of four vectors, each as above.
    static void sum_four(const F (&f)[4], float* out) {
        __m256 eight[4];
        for (int i = 0; i < 4; ++i) eight[i] = _mm256_add_ps(f[i].low, f[i].high);
        const __m256d ab = joined(eight[0], eight[1]), cd = joined(eight[2], eight[3]);
        __m256 two = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));  // of a and c, then of b and d
        two = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), two);
        const __m256 one = _mm256_add_ps(two, _mm256_movehdup_ps(two));
        const __m128 ac = _mm256_castps256_ps128(one), bd = _mm_moveldup_ps(_mm256_extractf128_ps(one, 1));
        _mm_storeu_ps(out, _mm_blend_ps(ac, bd, 0b1010));
    }
    // a's halves added, then b's.
    static __m256d joined(__m256 a, __m256 b) {
        return _mm256_castps_pd(_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
    }

    static F bf16(const std::uint8_t* p) { return {half(p), half(p + 16)}; }
    static void bf16_pairs(const std::uint8_t* p, F& even, F& odd) {
        const __m256i low = bytes(p), high = bytes(p + 32);
        const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        even = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
        odd = {_mm256_castsi256_ps(_mm256_and_si256(low, top)), _mm256_castsi256_ps(_mm256_and_si256(high, top))};
    }

    static F f16(const std::uint8_t* p) { return {f16_half(p), f16_half(p + 16)}; }
    static void f16_pairs(const std::uint8_t* p, F& even, F& odd) {
        const __m256i low = bytes(p), high = bytes(p + 32), bottom = _mm256_set1_epi32(0xffff);
        even = halves(_mm256_and_si256(low, bottom), _mm256_and_si256(high, bottom));
        odd = halves(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16));
    }
    static F f32(const std::uint8_t* p) { return {_mm256_castsi256_ps(bytes(p)), _mm256_castsi256_ps(bytes(p + 32))}; }
    static void f32_pairs(const std::uint8_t* p, F& even, F& odd) {
        const F low = f32(p), high = f32(p + 64);
        even = {in_order(_mm256_shuffle_ps(low.low, low.high, 0x88)), in_order(_mm256_shuffle_ps(high.low, high.high, 0x88))};
        odd = {in_order(_mm256_shuffle_ps(low.low, low.high, 0xdd)), in_order(_mm256_shuffle_ps(high.low, high.high, 0xdd))};
    }

    static Packed packed(const std::uint8_t* p) {
        Packed result;
        result.from = p;
        return result;
    }
    // Of the first `blocks` blocks, zeros after them.
    static Packed packed_of(const std::uint8_t* p, int blocks) {
        Packed result = {};
        __builtin_memcpy(result.padded, p, static_cast<std::size_t>(blocks) * kBlockBytes);
        return result;
    }
    // Dot products of R rows with T tokens over one ActBlock512.
    template <int R, int T>
    static void multiply(const Packed (&packed)[R], const ActBlock512* const (&x)[T], I (&dots)[R][T]) {
        for (int r = 0; r < R; ++r) {
            __m256i w[8];
            weights(packed[r].bytes(), w);
            for (int t = 0; t < T; ++t) dots[r][t].low = some_dot(*x[t], 0, [&](int j) { return w[j]; });
            weights(packed[r].bytes() + 32, w);
            for (int t = 0; t < T; ++t) dots[r][t].high = some_dot(*x[t], 32, [&](int j) { return w[j]; });
        }
    }
    static Decoded decode(const Packed& packed) {
        Decoded decoded;
        weights(packed.bytes(), decoded.low);
        weights(packed.bytes() + 32, decoded.high);
        return decoded;
    }
    template <int R, int T>
    static void multiply(const Decoded (&decoded)[R], const ActBlock512* const (&x)[T], I (&dots)[R][T]) {
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) dots[r][t].low = some_dot(*x[t], 0, [&](int j) { return decoded[r].low[j]; });
            for (int t = 0; t < T; ++t) dots[r][t].high = some_dot(*x[t], 32, [&](int j) { return decoded[r].high[j]; });
        }
    }
    // Dot products of R rows of Q8_0 with T tokens over one WordBlock512. `width`: from one vector of codes to the next.
    // Prefetches codes `ahead` bytes later.
    template <int R, int T>
    static void multiply_words(const std::uint8_t* codes, std::ptrdiff_t stride, std::ptrdiff_t width, std::ptrdiff_t ahead,
                               const WordBlock512* const (&x)[T], I (&dots)[R][T]) {
        for (int half = 0; half < 2; ++half) {
            __m256i sums[R][T];
            for (int r = 0; r < R; ++r) {
                for (int t = 0; t < T; ++t) sums[r][t] = _mm256_setzero_si256();
            }
            for (int k = 0; k < kBlock / 2; ++k) {
                for (int r = 0; r < R; ++r) {
                    const std::uint8_t* from = codes + r * stride + k * width + 16 * half;
                    if (half == 0 && k % 2 == 0) prefetch(from + ahead);
                    const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
                    for (int t = 0; t < T; ++t) {
                        const __m256i products = _mm256_madd_epi16(w, bytes(x[t]->words[k] + kLanes * half));
                        sums[r][t] = _mm256_add_epi32(sums[r][t], products);
                    }
                }
            }
            for (int r = 0; r < R; ++r) {
                for (int t = 0; t < T; ++t) (half ? dots[r][t].high : dots[r][t].low) = sums[r][t];
            }
        }
    }
    static F scales(const std::uint8_t* p) {
        const __m128i lanes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m128i all = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), lanes);
        return {exponents(all), exponents(_mm_srli_si128(all, 8))};
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
    static __m256 f16_half(const std::uint8_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    // F16 bits, one in each 32, as floats.
    static F halves(__m256i low, __m256i high) {
        const __m256i all = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(all)), _mm256_cvtph_ps(_mm256_extracti128_si256(all, 1))};
    }
    // What a shuffle within 128 bits took from two registers, those of the first before those of the second.
    static __m256 in_order(__m256 pairs) {
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8));
    }
    static __m256 power(__m256 n) {
        const __m256i dots = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(dots, 23));
    }
    static __m256 exponents(__m128i eight) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(eight), 23));
    }
    // Eight lanes, from the block of the first on: doubled weights plus 12, in the layout of ActBlock512.
    static void weights(const std::uint8_t* p, __m256i (&w)[8]) {
        const __m256i table = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        const __m256i a = bytes(p), b = bytes(p + 64), c = bytes(p + 128), d = bytes(p + 192);
        const __m256i ab[2] = {_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)};
        const __m256i cd[2] = {_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d)};
        const __m256i nibble = _mm256_set1_epi8(15);
        for (int k = 0; k < 4; ++k) {
            const __m256i words = k % 2 ? _mm256_unpackhi_epi64(ab[k / 2], cd[k / 2]) : _mm256_unpacklo_epi64(ab[k / 2], cd[k / 2]);
            w[2 * k] = _mm256_shuffle_epi8(table, _mm256_and_si256(words, nibble));
            w[2 * k + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(words, 4), nibble));
        }
    }
    // Pairs of products are at most 2 * 24 * 128: four of them stay within 16 bits.
    template <class At>
    static __m256i some_dot(const ActBlock512& x, int start, At at) {
        __m256i highs[2], lows[2];
        for (int j = 0; j < 8; ++j) {
            const __m256i w = at(j);
            const __m256i high = _mm256_maddubs_epi16(w, bytes(x.high[j] + start));
            const __m256i low = _mm256_maddubs_epi16(w, bytes(x.low[j] + start));
            highs[j / 4] = j % 4 ? _mm256_add_epi16(highs[j / 4], high) : high;
            lows[j / 4] = j % 4 ? _mm256_add_epi16(lows[j / 4], low) : low;
        }
        const __m256i one = _mm256_set1_epi16(1);
        const auto joined = [&](__m256i (&two)[2]) {
            return _mm256_add_epi32(_mm256_madd_epi16(two[0], one), _mm256_madd_epi16(two[1], one));
        };
        const __m256i sums = _mm256_add_epi32(_mm256_slli_epi32(joined(highs), 8), joined(lows));
        return _mm256_add_epi32(sums, bytes(x.starts + start / 4));
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
