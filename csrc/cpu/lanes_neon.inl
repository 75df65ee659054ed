// Sixteen lanes in four registers of NEON.
namespace moe_surgery::cpu {
namespace {

struct LanesNeon {
    struct F {
        float32x4_t at[4];
    };
    struct I {
        int32x4_t at[4];
    };
    // Doubled weights, as the vectors of ActBlock512: four lanes of each, then the next four.
    struct Packed {
        int8x16_t at[4][8];
    };
    using Decoded = Packed;
    static constexpr int kRows = 2, kTokens = 2, kPackedRows = 1, kColumnRows = 1, kValueHeads = 1, kScoreVectors = 1;
    static constexpr int kWordRows = 2, kWordTokens = 2, kDecodedRows = 1, kDecodedTokens = 2;

    template <class Each>
    static F each(Each value) { return {{value(0), value(1), value(2), value(3)}}; }

    static F zero() { return set(0.0f); }
    static F set(float x) { return each([&](int) { return vdupq_n_f32(x); }); }
    static F load(const float* p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
    static void store(float* p, F f) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, f.at[i]);
    }
    static F add(F a, F b) { return each([&](int i) { return vaddq_f32(a.at[i], b.at[i]); }); }
    static F sub(F a, F b) { return each([&](int i) { return vsubq_f32(a.at[i], b.at[i]); }); }
    static F mul(F a, F b) { return each([&](int i) { return vmulq_f32(a.at[i], b.at[i]); }); }
    static F div(F a, F b) { return each([&](int i) { return vdivq_f32(a.at[i], b.at[i]); }); }
    // The second where the comparison is false, as on x86.
    static F min(F a, F b) {
        return each([&](int i) { return vbslq_f32(vcltq_f32(a.at[i], b.at[i]), a.at[i], b.at[i]); });
    }
    static F max(F a, F b) {
        return each([&](int i) { return vbslq_f32(vcgtq_f32(a.at[i], b.at[i]), a.at[i], b.at[i]); });
    }
    static F fma(F a, F b, F c) { return each([&](int i) { return vfmaq_f32(c.at[i], a.at[i], b.at[i]); }); }
    static F round(F a) { return each([&](int i) { return vrndnq_f32(a.at[i]); }); }
    static F power_of_two(F n) {
        return each([&](int i) {
            const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.at[i]), vdupq_n_s32(127));
            return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
        });
    }
    static F to_float(const I& x) { return each([&](int i) { return vcvtq_f32_s32(x.at[i]); }); }

    static float sum(F f) {
        const float32x4_t sums = four(f);
        const float32x2_t two = vadd_f32(vget_low_f32(sums), vget_high_f32(sums));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }

    // The sums of four vectors, each as above.
    static void sum_four(const F (&f)[4], float* out) {
        float32x4_t two[2];
        for (int i = 0; i < 2; ++i) {
            const float32x4_t a = four(f[2 * i]), b = four(f[2 * i + 1]);
            two[i] = vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)), vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
        }
        vst1q_f32(out, vpaddq_f32(two[0], two[1]));
    }
    static float32x4_t four(const F& f) { return vaddq_f32(vaddq_f32(f.at[0], f.at[2]), vaddq_f32(f.at[1], f.at[3])); }

    static F bf16(const std::uint8_t* p) {
        return each([&](int i) {
            const uint16x4_t bits = vreinterpret_u16_u8(vld1_u8(p + 8 * i));
            return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
        });
    }
    static void bf16_pairs(const std::uint8_t* p, F& even, F& odd) {
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t bits = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
            even.at[i] = vreinterpretq_f32_u32(vshlq_n_u32(bits, 16));
            odd.at[i] = vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff0000u)));
        }
    }

    static F f16(const std::uint8_t* p) {
        return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i))); });
    }
    static void f16_pairs(const std::uint8_t* p, F& even, F& odd) {
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t bits = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
            even.at[i] = vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(bits)));
            odd.at[i] = vcvt_f32_f16(vreinterpret_f16_u16(vshrn_n_u32(bits, 16)));
        }
    }
    static F f32(const std::uint8_t* p) {
        return each([&](int i) { return vreinterpretq_f32_u8(vld1q_u8(p + 16 * i)); });
    }
    static void f32_pairs(const std::uint8_t* p, F& even, F& odd) {
        const F low = f32(p), high = f32(p + 64);
        even = {{vuzp1q_f32(low.at[0], low.at[1]), vuzp1q_f32(low.at[2], low.at[3]),
                 vuzp1q_f32(high.at[0], high.at[1]), vuzp1q_f32(high.at[2], high.at[3])}};
        odd = {{vuzp2q_f32(low.at[0], low.at[1]), vuzp2q_f32(low.at[2], low.at[3]),
                vuzp2q_f32(high.at[0], high.at[1]), vuzp2q_f32(high.at[2], high.at[3])}};
    }

    static Packed packed(const std::uint8_t* p) {
        static constexpr std::int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        const int8x16_t table = vld1q_s8(kDoubled);
        Packed result;
        for (int four = 0; four < 4; ++four) {
            uint32x4_t parts[4];
            for (int i = 0; i < 4; ++i) parts[i] = vreinterpretq_u32_u8(vld1q_u8(p + 64 * i + 16 * four));
            const uint64x2_t ab[2] = {zip_low(parts[0], parts[1]), zip_high(parts[0], parts[1])};
            const uint64x2_t cd[2] = {zip_low(parts[2], parts[3]), zip_high(parts[2], parts[3])};
            for (int k = 0; k < 4; ++k) {
                const uint64x2_t words = k % 2 ? vzip2q_u64(ab[k / 2], cd[k / 2]) : vzip1q_u64(ab[k / 2], cd[k / 2]);
                const uint8x16_t packed = vreinterpretq_u8_u64(words);
                result.at[four][2 * k] = vqtbl1q_s8(table, vandq_u8(packed, vdupq_n_u8(15)));
                result.at[four][2 * k + 1] = vqtbl1q_s8(table, vshrq_n_u8(packed, 4));
            }
        }
        return result;
    }
    // Of the first `blocks` blocks, zeros after them.
    static Packed packed_of(const std::uint8_t* p, int blocks) {
        std::uint8_t padded[kActBlockBytes] = {};
        __builtin_memcpy(padded, p, static_cast<std::size_t>(blocks) * kBlockBytes);
        return packed(padded);
    }
    static const Decoded& decode(const Packed& packed) { return packed; }
    // Dot products of R rows with T tokens over one ActBlock512.
    template <int R, int T>
    static void multiply(const Packed (&w)[R], const ActBlock512* const (&x)[T], I (&dots)[R][T]) {
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) {
                for (int four = 0; four < 4; ++four) {
                    dots[r][t].at[four] = dot(*x[t], four, [&](int j) { return w[r].at[four][j]; });
                }
            }
        }
    }
    // Dot products of R rows of Q8_0 with T tokens over one WordBlock512. `width`: from one vector of codes to the next.
    // Prefetches codes `ahead` bytes later.
    template <int R, int T>
    static void multiply_words(const std::uint8_t* codes, std::ptrdiff_t stride, std::ptrdiff_t width, std::ptrdiff_t ahead,
                               const WordBlock512* const (&x)[T], I (&dots)[R][T]) {
        for (int four = 0; four < 4; ++four) {
            // The products of a lane lie side by side: two lanes in each vector.
            int32x4_t low[R][T], high[R][T];
            for (int r = 0; r < R; ++r) {
                for (int t = 0; t < T; ++t) low[r][t] = high[r][t] = vdupq_n_s32(0);
            }
            for (int k = 0; k < kBlock / 2; ++k) {
                for (int r = 0; r < R; ++r) {
                    const std::uint8_t* from = codes + r * stride + k * width + 8 * four;
                    if (four == 0 && k % 2 == 0) prefetch(from + ahead);
                    const int16x8_t w = vmovl_s8(vreinterpret_s8_u8(vld1_u8(from)));
                    for (int t = 0; t < T; ++t) {
                        const int16x8_t words = vld1q_s16(x[t]->words[k] + 8 * four);
                        low[r][t] = vmlal_s16(low[r][t], vget_low_s16(w), vget_low_s16(words));
                        high[r][t] = vmlal_high_s16(high[r][t], w, words);
                    }
                }
            }
            for (int r = 0; r < R; ++r) {
                for (int t = 0; t < T; ++t) dots[r][t].at[four] = vpaddq_s32(low[r][t], high[r][t]);
            }
        }
    }
    static F scales(const std::uint8_t* p) {
        return each([&](int i) {
            const std::uint32_t at[4] = {p[block_of(4 * i)], p[block_of(4 * i + 1)], p[block_of(4 * i + 2)], p[block_of(4 * i + 3)]};
            return vreinterpretq_f32_u32(vshlq_n_u32(vld1q_u32(at), 23));
        });
    }
    static void store_rounded(std::int16_t* p, F f) {
        for (int i = 0; i < 4; ++i) vst1_s16(p + 4 * i, vmovn_s32(vcvtnq_s32_f32(f.at[i])));
    }

  private:
    static uint64x2_t zip_low(uint32x4_t a, uint32x4_t b) { return vreinterpretq_u64_u32(vzip1q_u32(a, b)); }
    static uint64x2_t zip_high(uint32x4_t a, uint32x4_t b) { return vreinterpretq_u64_u32(vzip2q_u32(a, b)); }

    // Products are at most 12 * 128: eight of them stay within 16 bits.
    template <class At>
    static int32x4_t dot(const ActBlock512& x, int four, At at) {
        int16x8_t highs[2], lows[2];
        for (int j = 0; j < 8; ++j) {
            const int8x16_t w = at(j), high = vld1q_s8(x.high[j] + 16 * four), low = vld1q_s8(x.low[j] + 16 * four);
            if (j == 0) {
                highs[0] = vmull_s8(vget_low_s8(w), vget_low_s8(high));
                highs[1] = vmull_high_s8(w, high);
                lows[0] = vmull_s8(vget_low_s8(w), vget_low_s8(low));
                lows[1] = vmull_high_s8(w, low);
            } else {
                highs[0] = vmlal_s8(highs[0], vget_low_s8(w), vget_low_s8(high));
                highs[1] = vmlal_high_s8(highs[1], w, high);
                lows[0] = vmlal_s8(lows[0], vget_low_s8(w), vget_low_s8(low));
                lows[1] = vmlal_high_s8(lows[1], w, low);
            }
        }
        const int32x4_t high = vpaddq_s32(vpaddlq_s16(highs[0]), vpaddlq_s16(highs[1]));
        return vaddq_s32(vshlq_n_s32(high, 8), vpaddq_s32(vpaddlq_s16(lows[0]), vpaddlq_s16(lows[1])));
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
