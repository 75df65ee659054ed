// Sixteen lanes in plain C++.
namespace moe_surgery::cpu {
namespace {

struct LanesScalar {
    struct F {
        float at[16];
    };
    struct I {
        std::int32_t at[16];
    };
    // Doubled weights, as the vectors of ActBlock512.
    struct Packed {
        std::int8_t at[8][64];
    };
    using Decoded = Packed;
    static constexpr int kRows = 1, kTokens = 2, kPackedRows = 1, kColumnRows = 1, kValueHeads = 1, kScoreVectors = 1;
    static constexpr int kWordRows = 1, kWordTokens = 2, kDecodedRows = 1, kDecodedTokens = 2;

    template <class Each>
    static F each(Each value) {
        F f;
        for (int i = 0; i < 16; ++i) f.at[i] = value(i);
        return f;
    }
    static F zero() { return set(0.0f); }
    static F set(float x) { return each([&](int) { return x; }); }
    static F load(const float* p) { return each([&](int i) { return p[i]; }); }
    static void store(float* p, F f) { std::memcpy(p, f.at, sizeof f.at); }
    static F add(F a, F b) { return each([&](int i) { return a.at[i] + b.at[i]; }); }
    static F sub(F a, F b) { return each([&](int i) { return a.at[i] - b.at[i]; }); }
    static F mul(F a, F b) { return each([&](int i) { return a.at[i] * b.at[i]; }); }
    static F div(F a, F b) { return each([&](int i) { return a.at[i] / b.at[i]; }); }
    // The second where the comparison is false, as with x86 vector instructions.
    static F min(F a, F b) { return each([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; }); }
    static F max(F a, F b) { return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; }); }
    static F fma(F a, F b, F c) { return each([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); }); }
    // To the nearest whole number, ties to even; |x| < 2^22.
    static F round(F a) { return each([&](int i) { return std::nearbyint(a.at[i]); }); }
    // 2^n for whole n from -126 to 127.
    static F power_of_two(F n) {
        return each([&](int i) { return from_bits(static_cast<std::uint32_t>(static_cast<int>(n.at[i]) + 127) << 23); });
    }
    static F to_float(I x) { return each([&](int i) { return static_cast<float>(x.at[i]); }); }

    static float sum(F f) {
        for (int width = 8; width > 0; width /= 2) {
            for (int i = 0; i < width; ++i) f.at[i] += f.at[i + width];
        }
        return f.at[0];
    }

    static void sum_four(const F (&f)[4], float* out) {
        for (int i = 0; i < 4; ++i) out[i] = sum(f[i]);
    }

    static F bf16(const std::uint8_t* p) { return each([&](int i) { return bf16_at(p, i); }); }
    static void bf16_pairs(const std::uint8_t* p, F& even, F& odd) {
        even = each([&](int i) { return bf16_at(p, 2 * i); });
        odd = each([&](int i) { return bf16_at(p, 2 * i + 1); });
    }

    static F f16(const std::uint8_t* p) { return each([&](int i) { return f16_at(p, i); }); }
    static void f16_pairs(const std::uint8_t* p, F& even, F& odd) {
        even = each([&](int i) { return f16_at(p, 2 * i); });
        odd = each([&](int i) { return f16_at(p, 2 * i + 1); });
    }
    static F f32(const std::uint8_t* p) { return each([&](int i) { return f32_at(p, i); }); }
    static void f32_pairs(const std::uint8_t* p, F& even, F& odd) {
        even = each([&](int i) { return f32_at(p, 2 * i); });
        odd = each([&](int i) { return f32_at(p, 2 * i + 1); });
    }

    static Packed packed(const std::uint8_t* p) {
        static constexpr std::int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        Packed packed;
        for (int j = 0; j < 8; ++j) {
            for (int i = 0; i < 64; ++i) {
                const int byte = p[block_of(i / 4) * kBlockBytes + j / 2 * 4 + i % 4];
                packed.at[j][i] = kDoubled[j % 2 ? byte >> 4 : byte & 15];
            }
        }
        return packed;
    }
    // Of the first `blocks` blocks, zeros after them.
    static Packed packed_of(const std::uint8_t* p, int blocks) {
        std::uint8_t padded[kActBlockBytes] = {};
        std::memcpy(padded, p, static_cast<std::size_t>(blocks) * kBlockBytes);
        return packed(padded);
    }
    static const Decoded& decode(const Packed& packed) { return packed; }
    // Dot products of R rows with T tokens over one ActBlock512.
    template <int R, int T>
    static void multiply(const Packed (&w)[R], const ActBlock512* const (&x)[T], I (&dots)[R][T]) {
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) dots[r][t] = dot(w[r].at[0], *x[t]);
        }
    }
    static I dot(const std::int8_t* w, const ActBlock512& x) {
        I sums = {};
        for (int j = 0; j < 8; ++j) {
            for (int i = 0; i < 64; ++i) sums.at[i / 4] += w[64 * j + i] * (256 * x.high[j][i] + x.low[j][i]);
        }
        return sums;
    }
    // Dot products of R rows of Q8_0 with T tokens over one WordBlock512. `width`: from one vector of codes to the next.
    template <int R, int T>
    static void multiply_words(const std::uint8_t* codes, std::ptrdiff_t stride, std::ptrdiff_t width, std::ptrdiff_t,
                               const WordBlock512* const (&x)[T], I (&dots)[R][T]) {
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) {
                dots[r][t] = {};
                for (int k = 0; k < kBlock / 2; ++k) {
                    const auto* from = reinterpret_cast<const std::int8_t*>(codes + r * stride + k * width);
                    for (int i = 0; i < 2 * kLanes; ++i) dots[r][t].at[i / 2] += from[i] * x[t]->words[k][i];
                }
            }
        }
    }
    static F scales(const std::uint8_t* p) {
        return each([&](int i) { return from_bits(static_cast<std::uint32_t>(p[block_of(i)]) << 23); });
    }
    static void store_rounded(std::int16_t* p, F f) {
        for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int16_t>(std::nearbyint(f.at[i]));
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
