// Sixteen lanes in one register of AVX-512. `Vnni`: with its integer dot products.
namespace moe_surgery::cpu {
namespace {

template <bool Vnni>
struct LanesAvx512 {
    using F = __m512;
    using I = __m512i;
    // The codes of an ActBlock512's columns: lane i of vector k holds word k of block_of(i).
    struct Packed {
        __m512i at[4];
    };
    static constexpr int kRows = 5, kTokens = 4, kPackedRows = 2, kColumnRows = 4, kValueHeads = 4, kScoreVectors = 4;
    static constexpr int kWordRows = 6, kWordTokens = 4, kDecodedRows = 4, kDecodedTokens = 2;
    // Doubled weights plus 12, in the order of ActBlock512's vectors.
    struct Decoded {
        __m512i at[8];
    };

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
        const I exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
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

    // The sums of four vectors, each as above.
    static void sum_four(const F (&f)[4], float* out) {
        const F ab = add(_mm512_shuffle_f32x4(f[0], f[1], 0x44), _mm512_shuffle_f32x4(f[0], f[1], 0xee));
        const F cd = add(_mm512_shuffle_f32x4(f[2], f[3], 0x44), _mm512_shuffle_f32x4(f[2], f[3], 0xee));
        F all = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
        all = add(all, _mm512_permute_ps(all, 0x4e));
        all = add(all, _mm512_permute_ps(all, 0xb1));
        _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(
                               _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12), all)));
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

    static F f16(const std::uint8_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void f16_pairs(const std::uint8_t* p, F& even, F& odd) {
        const I bits = _mm512_loadu_si512(p);
        even = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
        odd = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
    static F f32(const std::uint8_t* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
    static void f32_pairs(const std::uint8_t* p, F& even, F& odd) {
        const I even_lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const F low = f32(p), high = f32(p + 64);
        even = _mm512_permutex2var_ps(low, even_lanes, high);
        odd = _mm512_permutex2var_ps(low, _mm512_or_si512(even_lanes, _mm512_set1_epi32(1)), high);
    }

    static Packed packed(const std::uint8_t* p) {
        return transpose_words(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64), _mm512_loadu_si512(p + 128),
                      _mm512_loadu_si512(p + 192));
    }
    // Of the first `blocks` blocks, zeros after them.
    static Packed packed_of(const std::uint8_t* p, int blocks) {
        I parts[4];
        for (int i = 0; i < 4; ++i) {
            const int words = blocks < 4 * i ? 0 : blocks > 4 * i + 4 ? 8 : 2 * (blocks - 4 * i);
            parts[i] = _mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << words) - 1), p + 64 * i);
        }
        return transpose_words(parts[0], parts[1], parts[2], parts[3]);
    }
    // Keeps a vector in its register: the compiler would load it again from memory.
    static I pin_register(I vector) {
        asm("" : "+v"(vector));
        return vector;
    }
    static Packed transpose_words(I a, I b, I c, I d) {
        a = pin_register(a), b = pin_register(b), c = pin_register(c), d = pin_register(d);
        const I ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
        const I cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
        return {{_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
                 _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)}};
    }
    // Doubled weights plus 12: of the low nibbles or, shifted, the high ones.
    static I lookup(I nibbles) {
        const I table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        return _mm512_shuffle_epi8(table, _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
    }
    // Vector j of ActBlock512's order.
    static I weights(const Packed& packed, int j) {
        return lookup(j % 2 ? _mm512_srli_epi16(packed.at[j / 2], 4) : packed.at[j / 2]);
    }
    static Decoded decode(const Packed& packed) {
        Decoded decoded;
        for (int j = 0; j < 8; ++j) decoded.at[j] = weights(packed, j);
        return decoded;
    }
    // Dot products of R rows with T tokens over one ActBlock512.
    template <int R, int T>
    static void multiply(const Packed (&packed)[R], const ActBlock512* const (&x)[T], I (&dots)[R][T]) {
        I highs[R][T], lows[R][T];
        start(x, highs, lows);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            I high[T], low[T];
            for (int t = 0; t < T; ++t) {
                high[t] = pin_register(_mm512_load_si512(x[t]->high[j]));
                low[t] = pin_register(_mm512_load_si512(x[t]->low[j]));
            }
            for (int r = 0; r < R; ++r) {
                const I w = weights(packed[r], j);
                for (int t = 0; t < T; ++t) {
                    highs[r][t] = dot(highs[r][t], w, high[t]);
                    lows[r][t] = dot(lows[r][t], w, low[t]);
                }
            }
        }
        join(highs, lows, dots);
    }
    template <int R, int T>
    static void multiply(const Decoded (&decoded)[R], const ActBlock512* const (&x)[T], I (&dots)[R][T]) {
        I highs[R][T], lows[R][T];
        start(x, highs, lows);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            I w[R];
            for (int r = 0; r < R; ++r) w[r] = pin_register(decoded[r].at[j]);
            for (int t = 0; t < T; ++t) {
                const I high = pin_register(_mm512_load_si512(x[t]->high[j]));
                const I low = pin_register(_mm512_load_si512(x[t]->low[j]));
                for (int r = 0; r < R; ++r) {
                    highs[r][t] = dot(highs[r][t], w[r], high);
                    lows[r][t] = dot(lows[r][t], w[r], low);
                }
            }
        }
        join(highs, lows, dots);
    }
    template <int R, int T>
    static void start(const ActBlock512* const (&x)[T], I (&highs)[R][T], I (&lows)[R][T]) {
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) {
                highs[r][t] = _mm512_setzero_si512();
                lows[r][t] = _mm512_load_si512(x[t]->starts);
            }
        }
    }
    template <int R, int T>
    static void join(const I (&highs)[R][T], const I (&lows)[R][T], I (&dots)[R][T]) {
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) {
                dots[r][t] = _mm512_add_epi32(_mm512_slli_epi32(highs[r][t], 8), lows[r][t]);
            }
        }
    }
    // Adds four products of an unsigned and a signed byte to each lane. Without VNNI pairs of products are added
    // as 16 bits, at most 2 * 24 * 128.
    static I dot(I sums, I w, I x) {
        if constexpr (Vnni) {
            return _mm512_dpbusd_epi32(sums, w, x);
        } else {
            return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
        }
    }
    // Dot products of R rows of Q8_0 with T tokens over one WordBlock512. `width`: from one vector of codes to the next.
    // Prefetches codes `ahead` bytes later.
    template <int R, int T>
    static void multiply_words(const std::uint8_t* codes, std::ptrdiff_t stride, std::ptrdiff_t width, std::ptrdiff_t ahead,
                               const WordBlock512* const (&x)[T], I (&dots)[R][T]) {
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) dots[r][t] = _mm512_setzero_si512();
        }
#pragma GCC unroll 16
        for (int k = 0; k < kBlock / 2; ++k) {
            I words[T];
            for (int t = 0; t < T; ++t) words[t] = pin_register(_mm512_load_si512(x[t]->words[k]));
            for (int r = 0; r < R; ++r) {
                const std::uint8_t* from = codes + r * stride + k * width;
                if (k % 2 == 0) prefetch(from + ahead);
                const I w = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
                for (int t = 0; t < T; ++t) dots[r][t] = dot_words(dots[r][t], w, words[t]);
            }
        }
    }
    // Adds two products of 16-bit integers to each lane.
    static I dot_words(I sums, I w, I x) {
        if constexpr (Vnni) {
            return _mm512_dpwssd_epi32(sums, w, x);
        } else {
            return _mm512_add_epi32(sums, _mm512_madd_epi16(w, x));
        }
    }
    static F scales(const std::uint8_t* p) {
        const __m128i lanes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), lanes);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23));
    }
    static void store_rounded(std::int16_t* p, F f) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(f)));
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
