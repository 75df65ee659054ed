// SwiGLU and RMSNorm.
#pragma once

#include "lane_math.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
struct Elementwise {
    using F = typename V::F;
    using Math = LaneMath<V>;

    static F swiglu(F gate, F up, F limit, F alpha) {
        const F one = V::set(1.0f);
        // The value last, so that NaN stays NaN.
        gate = V::min(limit, gate);
        up = V::max(V::sub(V::zero(), limit), V::min(limit, up));
        const F exp_neg = Math::exp(V::mul(V::sub(V::zero(), alpha), gate));
        return V::mul(V::add(up, one), V::div(gate, V::add(one, exp_neg)));
    }

    static void swiglu(const float* h, std::ptrdiff_t intermediate, float limit, float alpha, float* z) {
        for (std::ptrdiff_t i = 0; i < intermediate; i += kLanes) {
            const std::ptrdiff_t count = min_of(kLanes, intermediate - i);
            float gates[kLanes] = {}, ups[kLanes] = {};
            for (std::ptrdiff_t j = 0; j < count; ++j) {
                gates[j] = h[2 * (i + j)];
                ups[j] = h[2 * (i + j) + 1];
            }
            Math::store_partial(z + i, swiglu(V::load(gates), V::load(ups), V::set(limit), V::set(alpha)), count);
        }
    }

    static void rms_norm(const float* x, const Values& weight, std::ptrdiff_t columns, float eps, float* y) {
        Math::with(weight.dtype, [&](auto dtype) { rms_norm_of<decltype(dtype)>(x, weight.data, columns, eps, y); });
    }

    template <class W>
    static void rms_norm_of(const float* x, const std::uint8_t* weight, std::ptrdiff_t columns, float eps, float* y) {
        F squares = V::zero();
        for (std::ptrdiff_t c = 0; c < columns; c += kLanes) {
            const std::ptrdiff_t count = min_of(kLanes, columns - c);
            const F value = count == kLanes ? V::load(x + c) : Math::partial(x + c, count);
            squares = V::fma(value, value, squares);
        }
        const float mean = V::sum(squares) / static_cast<float>(columns);
        const F scale = V::set(1.0f / __builtin_sqrtf(mean + eps));
        for (std::ptrdiff_t c = 0; c < columns; c += kLanes) {
            const std::ptrdiff_t count = min_of(kLanes, columns - c);
            const bool all = count == kLanes;
            const F value = V::mul(all ? V::load(x + c) : Math::partial(x + c, count), scale);
            const std::uint8_t* p = weight + W::kBytes * c;
            const F weights = all ? W::lanes(p) : Math::template lanes_partial<W>(p, count);
            Math::store_partial(y + c, V::mul(value, weights), count);
        }
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
