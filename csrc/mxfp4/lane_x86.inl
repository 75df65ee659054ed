// The vector type of a single 16-byte lane, for x86; see vector_kernels.inl.
namespace moe_surgery::mxfp4 {
namespace {

struct LaneX86 {
    using Vec = __m128i;
    static constexpr std::ptrdiff_t kBytes = 16;

    static Vec load(const std::uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const Vec*>(from)); }
    static void store(std::uint8_t* to, Vec x) { _mm_storeu_si128(reinterpret_cast<Vec*>(to), x); }
    static Vec broadcast_lane(const std::uint8_t* from) { return load(from); }
    static Vec broadcast16(unsigned x) { return _mm_set1_epi16(static_cast<short>(x)); }
    static Vec bit_and(Vec a, Vec b) { return _mm_and_si128(a, b); }
    template <int N>
    static Vec shift_right16(Vec x) { return _mm_srli_epi16(x, N); }
    static Vec interleave_low8(Vec a, Vec b) { return _mm_unpacklo_epi8(a, b); }
    static Vec interleave_high8(Vec a, Vec b) { return _mm_unpackhi_epi8(a, b); }
    static Vec lookup(Vec table, Vec codes) { return _mm_shuffle_epi8(table, codes); }
    static Vec add_to_nonzero(Vec bits, Vec offset) {
        // Doubling drops the sign bit.
        const Vec zero = _mm_cmpeq_epi16(_mm_add_epi16(bits, bits), _mm_setzero_si128());
        return _mm_add_epi16(bits, _mm_andnot_si128(zero, offset));
    }
};

}  // namespace
}  // namespace moe_surgery::mxfp4
