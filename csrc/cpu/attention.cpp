// Attention over a cache whose slots are in any order: each query's keys are taken in order of position.
#include <algorithm>
#include <memory>
#include <utility>

#include "bits.hpp"
#include "engine.hpp"
#include "pool.hpp"

namespace moe_surgery::cpu {

VisibleKeys visible_keys(const Attention& a) {
    VisibleKeys visible;
    std::vector<std::int32_t> order;
    for (std::ptrdiff_t b = 0; b < a.batch; ++b) {
        const std::int64_t* positions = a.key_positions + b * a.key_position_stride;
        order.clear();
        for (std::ptrdiff_t s = 0; s < a.slots; ++s) {
            if (positions[s] >= 0) order.push_back(static_cast<std::int32_t>(s));
        }
        const auto earlier = [&](std::int32_t x, std::int32_t y) { return positions[x] < positions[y]; };
        if (!std::is_sorted(order.begin(), order.end(), earlier)) std::stable_sort(order.begin(), order.end(), earlier);
        for (std::ptrdiff_t q = 0; q < a.queries; ++q) {
            const std::int64_t position = a.query_positions[b * a.queries + q];
            const std::int64_t first = a.window ? position - a.window + 1 : 0;
            const auto at = [&](std::int64_t target) {
                return std::lower_bound(order.begin(), order.end(), target,
                                        [&](std::int32_t s, std::int64_t p) { return positions[s] < p; });
            };
            const auto begin = at(first), end = at(position + 1);
            if (begin < end) visible.slots.insert(visible.slots.end(), begin, end);
            visible.ends.push_back(static_cast<std::ptrdiff_t>(visible.slots.size()));
        }
    }
    return visible;
}

void Engine::attention(const Attention& a, const VisibleKeys& visible) const {
    const std::ptrdiff_t group = a.heads / a.kv_heads, all = a.batch * a.queries;
    // A few keys are done before another thread has woken up.
    const bool small = static_cast<std::ptrdiff_t>(visible.slots.size()) * a.heads * a.head_dim < 1 << 16;
    const int threads = small ? 1 : threads_;
    std::ptrdiff_t longest = 0, before = 0;
    for (std::ptrdiff_t end : visible.ends) longest = std::max(longest, end - std::exchange(before, end));
    const std::ptrdiff_t scratch_size = attention_scratch(longest);
    const std::unique_ptr<float[]> scores(new float[static_cast<std::size_t>(scratch_size * threads)]);
    const auto one = [&](std::ptrdiff_t piece, int thread) {
        const std::ptrdiff_t which = piece / a.kv_heads, kv_head = piece % a.kv_heads;
        const std::ptrdiff_t b = which / a.queries, query = which % a.queries;
        const std::ptrdiff_t begin = which ? visible.ends[static_cast<std::size_t>(which - 1)] : 0;
        const KeyRange range = {a.keys + b * a.key_strides[0] + kv_head * a.key_strides[1],
                                    a.values + b * a.value_strides[0] + kv_head * a.value_strides[1],
                                    a.key_strides[2],
                                    a.value_strides[2],
                                    visible.slots.data() + begin,
                                    visible.ends[static_cast<std::size_t>(which)] - begin,
                                    a.head_dim,
                                    a.is_f32};
        const std::ptrdiff_t head = kv_head * group;
        kernels_.attention(a.q + ((b * a.heads + head) * a.queries + query) * a.head_dim, a.queries * a.head_dim,
                        a.sinks + head, group, range, scores.get() + scratch_size * thread,
                        a.out + (which * a.heads + head) * a.head_dim);
    };
    Pool::shared().run(threads, {{all * a.kv_heads, one}});
}

}  // namespace moe_surgery::cpu
