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
    // Block by block: its doubled weights at even bytes' low and high nibbles, then at odd bytes'.
    struct Codes {
        int16x8_t plane[4][4];
    };
    static constexpr float kFactor = 1.0f;
    static constexpr int kRows = 2, kTokens = 2, kPackedRows = 2;

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
    // The second where the comparison does not hold, as on x86.
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
            const int32x4_t whole = vaddq_s32(vcvtnq_s32_f32(n.at[i]), vdupq_n_s32(127));
            return vreinterpretq_f32_s32(vshlq_n_s32(whole, 23));
        });
    }
    static F to_float(const I& x) { return each([&](int i) { return vcvtq_f32_s32(x.at[i]); }); }

    static float sum(F f) {
        const float32x4_t four = vaddq_f32(vaddq_f32(f.at[0], f.at[2]), vaddq_f32(f.at[1], f.at[3]));
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }

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

    static Codes codes(const std::uint8_t* p) {
        static constexpr std::int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        const int8x16_t table = vld1q_s8(kDoubled);
        Codes found;
        for (int block = 0; block < 4; ++block) {
            const uint8x16_t packed = vld1q_u8(p + 16 * block);
            const int16x8_t low = vreinterpretq_s16_s8(vqtbl1q_s8(table, vandq_u8(packed, vdupq_n_u8(15))));
            const int16x8_t high = vreinterpretq_s16_s8(vqtbl1q_s8(table, vshrq_n_u8(packed, 4)));
            found.plane[block][0] = vshrq_n_s16(vshlq_n_s16(low, 8), 8);
            found.plane[block][1] = vshrq_n_s16(vshlq_n_s16(high, 8), 8);
            found.plane[block][2] = vshrq_n_s16(low, 8);
            found.plane[block][3] = vshrq_n_s16(high, 8);
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
        I sums;
        for (int block = 0; block < 4; ++block) {
            int32x4_t low = vdupq_n_s32(0), high = low;
            for (int k = 0; k < 4; ++k) {
                const int16x8_t plane = vld1q_s16(x + k * length + 8 * block);
                low = vmlal_s16(low, vget_low_s16(w.plane[block][k]), vget_low_s16(plane));
                high = vmlal_high_s16(high, w.plane[block][k], plane);
            }
            sums.at[block] = vpaddq_s32(low, high);
        }
        return sums;
    }
    static F scales(std::uint32_t four) {
        return each([&](int i) { return vreinterpretq_f32_u32(vdupq_n_u32((four >> (8 * i) & 255) << 23)); });
    }
    static void store_rounded(std::int16_t* p, F f) {
        for (int i = 0; i < 4; ++i) vst1_s16(p + 4 * i, vmovn_s32(vcvtnq_s32_f32(f.at[i])));
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
