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
    // 128 weights times two, in the order of Quantized's planes.
    struct Codes {
        std::int16_t plane[4][32];
    };
    static constexpr float kFactor = 1.0f;  // of the integers that `dot` returns
    static constexpr int kRows = 1, kTokens = 2, kPackedRows = 1;

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
    // The second where the comparison does not hold, as the vector instructions of x86 have it.
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

    static F bf16(const std::uint8_t* p) { return each([&](int i) { return bf16_at(p, i); }); }
    static void bf16_pairs(const std::uint8_t* p, F& even, F& odd) {
        even = each([&](int i) { return bf16_at(p, 2 * i); });
        odd = each([&](int i) { return bf16_at(p, 2 * i + 1); });
    }

    static Codes codes(const std::uint8_t* p) {
        static constexpr std::int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        Codes found;
        for (int j = 0; j < 32; ++j) {
            found.plane[0][j] = kDoubled[p[2 * j] & 15];
            found.plane[1][j] = kDoubled[p[2 * j] >> 4];
            found.plane[2][j] = kDoubled[p[2 * j + 1] & 15];
            found.plane[3][j] = kDoubled[p[2 * j + 1] >> 4];
        }
        return found;
    }
    // Of so many blocks; zeros after them.
    static Codes codes_of(const std::uint8_t* p, int blocks) {
        std::uint8_t held[4 * kBlockBytes] = {};
        for (int i = 0; i < blocks; ++i) __builtin_memcpy(held + i * kBlockBytes, p + i * kBlockBytes, kBlockBytes);
        return codes(held);
    }
    static I dot(const Codes& w, const std::int16_t* x, std::ptrdiff_t length) {
        I sums = {};
        for (int k = 0; k < 4; ++k) {
            for (int j = 0; j < 32; ++j) sums.at[j / 2] += w.plane[k][j] * x[k * length + j];
        }
        return sums;
    }
    static F scales(std::uint32_t four) {
        return each([&](int i) { return from_bits((four >> (i / 4 * 8) & 255) << 23); });
    }
    static void store_rounded(std::int16_t* p, F f) {
        for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int16_t>(std::nearbyint(f.at[i]));
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
