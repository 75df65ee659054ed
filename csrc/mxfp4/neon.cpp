// The NEON kernels; every AArch64 processor has these instructions.
#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#include "kernel_sets.hpp"
#include "vector_kernels.inl"

namespace moe_surgery::mxfp4 {
namespace {

struct Neon {
    using Vec = uint8x16_t;
    using Sums = float64x2_t;
    static constexpr std::ptrdiff_t kBytes = 16;

    static uint16x8_t words(Vec x) { return vreinterpretq_u16_u8(x); }
    static Vec bytes(uint16x8_t x) { return vreinterpretq_u8_u16(x); }

    static Vec zero() { return vdupq_n_u8(0); }
    static Vec load(const std::uint8_t* from) { return vld1q_u8(from); }
    static void store(std::uint8_t* to, Vec x) { vst1q_u8(to, x); }
    static Vec broadcast16(unsigned x) { return bytes(vdupq_n_u16(static_cast<std::uint16_t>(x))); }
    static Vec broadcast_lane(const std::uint8_t* from) { return load(from); }

    static Vec load_lanes(const std::uint8_t* base, std::ptrdiff_t stride, int position) {
        return load(base + column_of<Neon>(position, 0) * stride);
    }
    static void store_lanes(std::uint8_t* base, std::ptrdiff_t stride, int position, Vec x) {
        store(base + column_of<Neon>(position, 0) * stride, x);
    }

    static Vec bit_and(Vec a, Vec b) { return vandq_u8(a, b); }
    static Vec bit_or(Vec a, Vec b) { return vorrq_u8(a, b); }
    static Vec or_difference(Vec so_far, Vec a, Vec b) { return vorrq_u8(so_far, veorq_u8(a, b)); }
    template <int N>
    static Vec shift_right16(Vec x) { return bytes(vshrq_n_u16(words(x), N)); }
    template <int N>
    static Vec shift_left16(Vec x) { return bytes(vshlq_n_u16(words(x), N)); }
    static Vec interleave_low8(Vec a, Vec b) { return vzip1q_u8(a, b); }
    static Vec interleave_high8(Vec a, Vec b) { return vzip2q_u8(a, b); }
    static Vec interleave_low16(Vec a, Vec b) { return bytes(vzip1q_u16(words(a), words(b))); }
    static Vec interleave_high16(Vec a, Vec b) { return bytes(vzip2q_u16(words(a), words(b))); }
    static Vec pack16(Vec first, Vec second) { return vuzp1q_u8(first, second); }
    static Vec lookup(Vec table, Vec codes) { return vqtbl1q_u8(table, codes); }

    static Vec max_u16(Vec a, Vec b) { return bytes(vmaxq_u16(words(a), words(b))); }
    static Vec min_u16(Vec a, Vec b) { return bytes(vminq_u16(words(a), words(b))); }
    static Vec add16(Vec a, Vec b) { return bytes(vaddq_u16(words(a), words(b))); }
    static Vec subtract_saturating_u16(Vec a, Vec b) { return bytes(vqsubq_u16(words(a), words(b))); }
    static Vec add_to_nonzero(Vec bits, Vec offset) {
        const uint16x8_t nonzero = vtstq_u16(words(bits), vdupq_n_u16(0x7fff));
        return bytes(vaddq_u16(words(bits), vandq_u16(nonzero, words(offset))));
    }
    // One more where x is above the limit.
    template <int Limit>
    static Vec add_if_above(Vec code, Vec x) {
        return bytes(vsubq_u16(words(code), vcgtq_u16(words(x), vdupq_n_u16(Limit))));
    }

    static Vec subtract_f32(Vec a, Vec b) {
        return vreinterpretq_u8_f32(vsubq_f32(vreinterpretq_f32_u8(a), vreinterpretq_f32_u8(b)));
    }
    static Sums no_sums() { return vdupq_n_f64(0.0); }
    static void add_squared_f32(Sums& sums, Vec x) {
        const float32x4_t floats = vreinterpretq_f32_u8(x);
        const float64x2_t low = vcvt_f64_f32(vget_low_f32(floats));
        const float64x2_t high = vcvt_high_f64_f32(floats);
        sums = vfmaq_f64(vfmaq_f64(sums, low, low), high, high);
    }
    static double total(Sums sums) { return vaddvq_f64(sums); }
};

}  // namespace

const Kernels kNeonKernels = {"neon", decode<Neon>, decode_transposed<Neon>, encode_transposed<Neon>};

}  // namespace moe_surgery::mxfp4

#endif
