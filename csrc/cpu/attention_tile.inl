// Attention of long steps: a few queries at a time, a block of keys after the other, which stays in the L1 cache
// meanwhile. Sixteen keys are in a register, so that scores need no sums across lanes.
#pragma once

#include "attention.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
struct AttentionTile {
    using F = typename V::F;
    using Kernel = AttentionKernel<V>;

    static void transpose_keys(const KeyRange& range, std::ptrdiff_t first, std::ptrdiff_t count, float* out) {
        for (std::ptrdiff_t i = 0; i < kKeysAtOnce; ++i) {
            const std::uint8_t* key = i < count ? range.keys + range.slots[first + i] * range.key_stride : nullptr;
            for (std::ptrdiff_t d = 0; d < range.head_dim; ++d) {
                out[d * kKeysAtOnce + i] = !key ? 0.0f : range.is_f32 ? f32_at(key, d) : bf16_at(key, d);
            }
        }
    }

    // scores[h * stride + i] of H heads with the 16 N keys from keys[0] on.
    template <int H, int N>
    static void scores_of(const float* q, std::ptrdiff_t q_stride, std::ptrdiff_t head_dim, const float* keys,
                          float* scores, std::ptrdiff_t stride) {
        F sums[H][N];
        for (int h = 0; h < H; ++h) {
            for (int n = 0; n < N; ++n) sums[h][n] = V::zero();
        }
        for (std::ptrdiff_t d = 0; d < head_dim; ++d, keys += kKeysAtOnce) {
            F parts[N];
            for (int n = 0; n < N; ++n) parts[n] = V::load(keys + n * kLanes);
            for (int h = 0; h < H; ++h) {
                const F value = V::set(q[h * q_stride + d]);
                for (int n = 0; n < N; ++n) sums[h][n] = V::fma(value, parts[n], sums[h][n]);
            }
        }
        for (int h = 0; h < H; ++h) {
            for (int n = 0; n < N; ++n) V::store(scores + h * stride + n * kLanes, sums[h][n]);
        }
    }

    // out[h * head_dim ..] += weights times the values of the range.
    template <bool IsF32, int D, int H>
    static void add_values(const float* weights, std::ptrdiff_t stride, const KeyRange& range, float* out) {
        constexpr int kAtOnce = D ? D : 1;
        const std::ptrdiff_t head_dim = D ? D * kLanes : range.head_dim;
        for (std::ptrdiff_t d = 0; d < head_dim; d += kAtOnce * kLanes) {
            F acc[H][kAtOnce];
            for (int h = 0; h < H; ++h) {
                for (int j = 0; j < kAtOnce; ++j) {
                    const std::ptrdiff_t start = d + j * kLanes, count = min_of(kLanes, head_dim - start);
                    const float* from = out + h * head_dim + start;
                    acc[h][j] = D ? V::load(from) : LaneMath<V>::partial(from, count);
                }
            }
            Kernel::template add_values<IsF32>(weights, stride, range, d, head_dim, acc);
            for (int h = 0; h < H; ++h) {
                for (int j = 0; j < kAtOnce; ++j) {
                    const std::ptrdiff_t start = d + j * kLanes;
                    float* into = out + h * head_dim + start;
                    if constexpr (D) {
                        V::store(into, acc[h][j]);
                    } else {
                        LaneMath<V>::store_partial(into, acc[h][j], min_of(kLanes, head_dim - start));
                    }
                }
            }
        }
    }

    // `some(head)` for H heads at a time, then `one(head)` for the rest.
    template <int H, class Some, class One>
    static inline void for_heads(std::ptrdiff_t heads, Some some, One one) {
        std::ptrdiff_t h = 0;
        for (; heads - h >= H; h += H) some(h);
        for (; h < heads; ++h) one(h);
    }

    template <bool IsF32, int D>
    static void tile_of(const QueryTile& tile, std::ptrdiff_t q_stride, const float* sinks, std::ptrdiff_t heads,
                        const KeyRange& range, const float* transposed, float* scratch) {
        constexpr int kVectors = V::kScoreVectors, kHeads = kHeadsAtOnce, kValueHeads = V::kValueHeads;
        const std::ptrdiff_t head_dim = range.head_dim;
        std::ptrdiff_t start = tile.first[0], end = tile.last[0];
        for (std::ptrdiff_t i = 1; i < tile.queries; ++i) {
            start = min_of(start, tile.first[i]);
            end = end > tile.last[i] ? end : tile.last[i];
        }
        start = start / kKeysAtOnce * kKeysAtOnce;
        const std::ptrdiff_t stride = tile_scores(end - start);
        const auto scores_at = [&](std::ptrdiff_t i, std::ptrdiff_t h) { return scratch + (i * heads + h) * stride; };

        for (std::ptrdiff_t block = start; block < end; block += kKeysAtOnce) {
            const float* keys = transposed + block * head_dim;
            for (std::ptrdiff_t i = 0; i < tile.queries; ++i) {
                if (block + kKeysAtOnce <= tile.first[i] || block >= tile.last[i]) continue;
                for (std::ptrdiff_t k = 0; k < kKeysAtOnce; k += kVectors * kLanes) {
                    const auto run = [&](auto some) {
                        return [&, some](std::ptrdiff_t h) {
                            some(tile.q[i] + h * q_stride, q_stride, head_dim, keys + k, scores_at(i, h) + block - start + k, stride);
                        };
                    };
                    for_heads<kHeads>(heads, run(scores_of<kHeads, kVectors>), run(scores_of<1, kVectors>));
                }
            }
        }
        const F factor = V::set(1.0f / __builtin_sqrtf(static_cast<float>(head_dim)));
        float inverse_sums[kQueriesAtOnce][kMostHeads];
        for (std::ptrdiff_t i = 0; i < tile.queries; ++i) {
            const std::ptrdiff_t count = tile.last[i] - tile.first[i], padded = (count + kLanes - 1) / kLanes * kLanes;
            for (std::ptrdiff_t h = 0; h < heads; ++h) {
                inverse_sums[i][h] = Kernel::softmax(scores_at(i, h) + tile.first[i] - start, count, padded, sinks[h], factor);
            }
            __builtin_memset(tile.out[i], 0, static_cast<std::size_t>(heads * head_dim) * sizeof(float));
        }
        for (std::ptrdiff_t block = start; block < end; block += kKeysAtOnce) {
            for (std::ptrdiff_t i = 0; i < tile.queries; ++i) {
                const std::ptrdiff_t first = block > tile.first[i] ? block : tile.first[i];
                KeyRange part = range;
                part.slots += first;
                part.count = min_of(block + kKeysAtOnce, tile.last[i]) - first;
                const auto run = [&](auto some) {
                    return [&, some](std::ptrdiff_t h) {
                        some(scores_at(i, h) + first - start, stride, part, tile.out[i] + h * head_dim);
                    };
                };
                for_heads<kValueHeads>(heads, run(add_values<IsF32, D, kValueHeads>), run(add_values<IsF32, D, 1>));
            }
        }
        for (std::ptrdiff_t i = 0; i < tile.queries; ++i) {
            for (std::ptrdiff_t h = 0; h < heads; ++h) {
                for (std::ptrdiff_t d = 0; d < head_dim; ++d) tile.out[i][h * head_dim + d] *= inverse_sums[i][h];
            }
        }
    }

    static void attention_tile(const QueryTile& tile, std::ptrdiff_t q_stride, const float* sinks, std::ptrdiff_t heads,
                               const KeyRange& range, const float* transposed, float* scratch) {
        const auto over = range.head_dim == 4 * kLanes ? (range.is_f32 ? tile_of<true, 4> : tile_of<false, 4>)
                                                       : (range.is_f32 ? tile_of<true, 0> : tile_of<false, 0>);
        over(tile, q_stride, sinks, heads, range, transposed, scratch);
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
