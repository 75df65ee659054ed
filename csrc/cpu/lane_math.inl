// Shared by all kernels, over the sixteen lanes V of one instruction set.
#pragma once

#include "bits.hpp"
#include "kernels.hpp"

namespace moe_surgery::cpu {
namespace {

// Weights are prefetched at least this many bytes before they are used, and at least a tile of rows before:
// with less, rows of the same tile prefetch what their neighbours have already read.
constexpr std::ptrdiff_t kAhead = 16384;

// Into the L2 cache: L1 allows too few requests in flight.
inline void prefetch(const std::uint8_t* p) { __builtin_prefetch(p, 0, 2); }

inline std::ptrdiff_t min_of(std::ptrdiff_t a, std::ptrdiff_t b) { return a < b ? a : b; }

template <class V>
struct LaneMath {
    using F = typename V::F;

    // e^x, with x clamped to at least -87; NaN stays NaN. Error within 2 units in the last place.
    static F exp(F x) {
        x = V::max(V::set(-87.0f), V::min(V::set(88.0f), x));
        const F n = V::round(V::mul(x, V::set(1.44269504f)));
        F r = V::fma(n, V::set(-0.693359375f), x);
        r = V::fma(n, V::set(2.12194440e-4f), r);
        F p = V::set(1.9875691500e-4f);
        p = V::fma(p, r, V::set(1.3981999507e-3f));
        p = V::fma(p, r, V::set(8.3334519073e-3f));
        p = V::fma(p, r, V::set(4.1665795894e-2f));
        p = V::fma(p, r, V::set(1.6666665459e-1f));
        p = V::fma(p, r, V::set(5.0000001201e-1f));
        p = V::add(V::fma(p, V::mul(r, r), r), V::set(1.0f));
        return V::mul(p, V::power_of_two(n));
    }

    static F partial(const float* p, std::ptrdiff_t count) {
        float buffer[kLanes] = {};
        __builtin_memcpy(buffer, p, static_cast<std::size_t>(count) * sizeof(float));
        return V::load(buffer);
    }

    static void store_partial(float* p, F f, std::ptrdiff_t count) {
        float buffer[kLanes];
        V::store(buffer, f);
        __builtin_memcpy(p, buffer, static_cast<std::size_t>(count) * sizeof(float));
    }

    // Reading values of a dtype: sixteen from p on; or 32 from p on, split into even and odd indices.
    struct Bf16 {
        static constexpr std::ptrdiff_t kBytes = 2;
        static F lanes(const std::uint8_t* p) { return V::bf16(p); }
        static void pairs(const std::uint8_t* p, F& even, F& odd) { V::bf16_pairs(p, even, odd); }
    };
    struct F16 {
        static constexpr std::ptrdiff_t kBytes = 2;
        static F lanes(const std::uint8_t* p) { return V::f16(p); }
        static void pairs(const std::uint8_t* p, F& even, F& odd) { V::f16_pairs(p, even, odd); }
    };
    struct F32 {
        static constexpr std::ptrdiff_t kBytes = 4;
        static F lanes(const std::uint8_t* p) { return V::f32(p); }
        static void pairs(const std::uint8_t* p, F& even, F& odd) { V::f32_pairs(p, even, odd); }
    };

    // Calls `run` with the reader of `dtype`.
    template <class Run>
    static void with(Dtype dtype, Run run) {
        switch (dtype) {
            case Dtype::bf16: return run(Bf16{});
            case Dtype::f16: return run(F16{});
            case Dtype::f32: return run(F32{});
            case Dtype::q8_0: break;  // see q8_0_rows.inl
        }
    }

    // `count` values, zeros after them.
    template <class W>
    static F lanes_partial(const std::uint8_t* p, std::ptrdiff_t count) {
        std::uint8_t buffer[W::kBytes * kLanes] = {};
        __builtin_memcpy(buffer, p, static_cast<std::size_t>(W::kBytes * count));
        return W::lanes(buffer);
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
