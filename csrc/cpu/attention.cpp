// Attention over a cache whose slots are in any order: each query's keys are taken in order of position. In long steps
// keys are transposed once, and a few queries go through them together.
#include <algorithm>
#include <vector>

#include "bits.hpp"
#include "engine.hpp"
#include "pool.hpp"
#include "scratch.hpp"

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
        const auto before = static_cast<std::ptrdiff_t>(visible.slots.size());
        for (std::ptrdiff_t q = 0; q < a.queries; ++q) {
            const std::int64_t position = a.query_positions[b * a.queries + q];
            const std::int64_t first = a.window ? position - a.window + 1 : 0;
            const auto at = [&](std::int64_t target) {
                return before + (std::lower_bound(order.begin(), order.end(), target,
                                                  [&](std::int32_t s, std::int64_t p) { return positions[s] < p; }) -
                                 order.begin());
            };
            const std::ptrdiff_t begin = at(first), end = at(position + 1);
            visible.queries.push_back({begin, std::max(begin, end)});
        }
        visible.slots.insert(visible.slots.end(), order.begin(), order.end());
        visible.sequences.push_back({before, static_cast<std::ptrdiff_t>(visible.slots.size())});
    }
    return visible;
}

KeyRange range_of(const Attention& a, const VisibleKeys& visible, std::ptrdiff_t b, std::ptrdiff_t kv_head,
                  const VisibleKeys::Range& keys) {
    return {a.keys + b * a.key_strides[0] + kv_head * a.key_strides[1],
            a.values + b * a.value_strides[0] + kv_head * a.value_strides[1],
            a.key_strides[2],
            a.value_strides[2],
            visible.slots.data() + keys.first,
            keys.count(),
            a.head_dim,
            a.is_f32};
}

KeyRange range_of(const Attention& a, const VisibleKeys& visible, std::ptrdiff_t b, std::ptrdiff_t kv_head) {
    return range_of(a, visible, b, kv_head, visible.sequences[static_cast<std::size_t>(b)]);
}

void Engine::attention(const Attention& a, const VisibleKeys& visible) const {
    if (!a.batch || !a.queries) return;
    if (long_step_) {
        if (!attention_in_tiles(a, visible)) long_attention(a, visible);
        return;
    }
    const std::ptrdiff_t group = a.heads / a.kv_heads, all = a.batch * a.queries;
    std::ptrdiff_t longest = 0, keys = 0;
    for (const VisibleKeys::Range& range : visible.queries) {
        longest = std::max(longest, range.count());
        keys += range.count();
    }
    // A few keys are done before another thread has woken up.
    const int threads = keys * a.heads * a.head_dim < 1 << 16 ? 1 : threads_;
    const std::ptrdiff_t scratch_size = attention_scratch(longest);
    const Scratch<float> scores(scratch_size * threads);
    const auto one = [&](std::ptrdiff_t piece, int thread) {
        const std::ptrdiff_t which = piece / a.kv_heads, kv_head = piece % a.kv_heads;
        const std::ptrdiff_t b = which / a.queries, query = which % a.queries;
        const KeyRange range = range_of(a, visible, b, kv_head, visible.queries[static_cast<std::size_t>(which)]);
        const std::ptrdiff_t head = kv_head * group;
        kernels_.attention(a.q + ((b * a.heads + head) * a.queries + query) * a.head_dim, a.queries * a.head_dim,
                        a.sinks + head, group, range, scores.get() + scratch_size * thread,
                        a.out + (which * a.heads + head) * a.head_dim);
    };
    Pool::shared().run(threads, {{all * a.kv_heads, one}});
}

void Engine::long_attention(const Attention& a, const VisibleKeys& visible) const {
    const std::ptrdiff_t group = a.heads / a.kv_heads, tiles = (a.queries + kQueriesAtOnce - 1) / kQueriesAtOnce;
    // Of each sequence, the first of its blocks of keys.
    std::vector<std::ptrdiff_t> blocks = {0};
    for (const VisibleKeys::Range& keys : visible.sequences) {
        blocks.push_back(blocks.back() + (keys.count() + kKeysAtOnce - 1) / kKeysAtOnce);
    }
    const std::ptrdiff_t block_size = kKeysAtOnce * a.head_dim, all_blocks = blocks.back();
    const auto keys_of = [&](std::ptrdiff_t b) { return visible.sequences[static_cast<std::size_t>(b)]; };
    // [kv_heads, all blocks, head_dim, keys of a block]
    const Scratch<float> transposed(a.kv_heads * all_blocks * block_size);
    const auto transposed_of = [&](std::ptrdiff_t b, std::ptrdiff_t kv_head) {
        return transposed.get() + (kv_head * all_blocks + blocks[static_cast<std::size_t>(b)]) * block_size;
    };
    const auto transpose = [&](std::ptrdiff_t piece, int) {
        const std::ptrdiff_t kv_head = piece % a.kv_heads, block = piece / a.kv_heads;
        const std::ptrdiff_t b = std::upper_bound(blocks.begin(), blocks.end(), block) - blocks.begin() - 1;
        const std::ptrdiff_t number = block - blocks[static_cast<std::size_t>(b)], first = number * kKeysAtOnce;
        kernels_.transpose_keys(range_of(a, visible, b, kv_head), first,
                                std::min(kKeysAtOnce, keys_of(b).count() - first), transposed_of(b, kv_head) + number * block_size);
    };

    // Tiles in order of the keys that they read; heads of a group in parts, if it has many.
    const std::ptrdiff_t parts = (group + kMostHeads - 1) / kMostHeads;
    const auto tile_of = [&](std::ptrdiff_t b, std::ptrdiff_t number) {
        QueryTile tile = {};
        tile.queries = std::min(kQueriesAtOnce, a.queries - number * kQueriesAtOnce);
        for (std::ptrdiff_t i = 0; i < tile.queries; ++i) {
            const auto query = static_cast<std::size_t>(b * a.queries + number * kQueriesAtOnce + i);
            tile.first[i] = visible.queries[query].first - keys_of(b).first;
            tile.last[i] = visible.queries[query].last - keys_of(b).first;
        }
        return tile;
    };
    std::ptrdiff_t longest = 0;
    for (std::ptrdiff_t b = 0; b < a.batch; ++b) {
        for (std::ptrdiff_t number = 0; number < tiles; ++number) {
            const QueryTile tile = tile_of(b, number);
            const std::ptrdiff_t last = *std::max_element(tile.last, tile.last + tile.queries);
            const std::ptrdiff_t first = *std::min_element(tile.first, tile.first + tile.queries);
            longest = std::max(longest, last - first / kKeysAtOnce * kKeysAtOnce);
        }
    }
    const std::ptrdiff_t scratch_size = kQueriesAtOnce * std::min(group, kMostHeads) * tile_scores(longest);
    const Scratch<float> scratch(scratch_size * threads_);
    const auto one = [&](std::ptrdiff_t piece, int thread) {
        const std::ptrdiff_t part = piece % parts, number = piece / parts % tiles;
        const std::ptrdiff_t kv_head = piece / (parts * tiles) % a.kv_heads, b = piece / (parts * tiles * a.kv_heads);
        const std::ptrdiff_t head = kv_head * group + part * kMostHeads;
        QueryTile tile = tile_of(b, number);
        for (std::ptrdiff_t i = 0; i < tile.queries; ++i) {
            const std::ptrdiff_t query = number * kQueriesAtOnce + i;
            tile.q[i] = a.q + ((b * a.heads + head) * a.queries + query) * a.head_dim;
            tile.out[i] = a.out + ((b * a.queries + query) * a.heads + head) * a.head_dim;
        }
        kernels_.attention_tile(tile, a.queries * a.head_dim, a.sinks + head, std::min(kMostHeads, group - part * kMostHeads),
                                range_of(a, visible, b, kv_head), transposed_of(b, kv_head),
                                scratch.get() + scratch_size * thread);
    };
    Pool::shared().run(threads_, {{all_blocks * a.kv_heads, transpose}, {a.batch * a.kv_heads * tiles * parts, one}});
}

}  // namespace moe_surgery::cpu
