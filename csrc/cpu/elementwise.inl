// SwiGLU and RMSNorm.
#pragma once

#include "lane_math.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
struct Elementwise {
    using F = typename V::F;
    using Math = LaneMath<V>;

    static void swiglu(const float* h, std::ptrdiff_t intermediate, float limit, float alpha, float* z) {
        const F one = V::set(1.0f);
        for (std::ptrdiff_t i = 0; i < intermediate; i += kLanes) {
            const std::ptrdiff_t count = min_of(kLanes, intermediate - i);
            float gates[kLanes] = {}, ups[kLanes] = {};
            for (std::ptrdiff_t j = 0; j < count; ++j) {
                gates[j] = h[2 * (i + j)];
                ups[j] = h[2 * (i + j) + 1];
            }
            // The value last, so that NaN stays NaN.
            const F gate = V::min(V::set(limit), V::load(gates));
            const F up = V::max(V::set(-limit), V::min(V::set(limit), V::load(ups)));
            const F exp_neg = Math::exp(V::mul(V::set(-alpha), gate));
            const F value = V::mul(V::add(up, one), V::div(gate, V::add(one, exp_neg)));
            Math::store_partial(z + i, value, count);
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
