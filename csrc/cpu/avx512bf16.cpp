// Tile products with AVX-512's BF16 dot products. Switched on for this file alone, before any include.
#if defined(__x86_64__)
#include "tiles.hpp"

#if defined(MOE_SURGERY_TILES)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
// GCC takes the deliberately undefined operands inside its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include "lane_math.inl"
#include "lanes_avx512.inl"
#include "tiles_avx512.inl"

namespace moe_surgery::cpu {
namespace {

struct Avx512Bf16Products {
    static void begin() {}
    static void end() {}

    // Rows of a tile whose sums are in registers together, for two tiles of tokens.
    static constexpr int kRowsAtOnce = 8;

    // Rows `row` to row + kRowsAtOnce of a weight tile times G token tiles.
    template <int G>
    static void block(const WeightTile* weights, int row, const SplitTile* tokens, std::ptrdiff_t token_stride,
                      std::ptrdiff_t blocks, bool first, SumTile* sums) {
        __m512 acc[kRowsAtOnce][G];
        for (int r = 0; r < kRowsAtOnce; ++r) {
            for (int g = 0; g < G; ++g) acc[r][g] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums[g].rows[row + r]);
        }
        for (std::ptrdiff_t b = 0; b < blocks; ++b) {
            for (int k = 0; k < kTileColumns / 2; ++k) {
                __m512bh high[G], low[G];
                for (int g = 0; g < G; ++g) {
                    const SplitTile& tile = tokens[g * token_stride + b];
                    high[g] = reinterpret_cast<__m512bh>(_mm512_load_si512(tile.high.pairs[k]));
                    low[g] = reinterpret_cast<__m512bh>(_mm512_load_si512(tile.low.pairs[k]));
                }
#pragma GCC unroll 8
                for (int r = 0; r < kRowsAtOnce; ++r) {
                    std::int32_t pair;
                    __builtin_memcpy(&pair, weights[b].rows[row + r] + 2 * k, sizeof pair);
                    const auto w = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
                    for (int g = 0; g < G; ++g) acc[r][g] = _mm512_dpbf16_ps(acc[r][g], high[g], w);
                    for (int g = 0; g < G; ++g) acc[r][g] = _mm512_dpbf16_ps(acc[r][g], low[g], w);
                }
            }
        }
        for (int r = 0; r < kRowsAtOnce; ++r) {
            for (int g = 0; g < G; ++g) _mm512_store_ps(sums[g].rows[row + r], acc[r][g]);
        }
    }

    static void multiply(const WeightPanel& weights, const TokenPanel& tokens, std::ptrdiff_t blocks, bool first,
                         SumTile* sums, std::ptrdiff_t stride, const Meanwhile& meanwhile) {
        for (std::ptrdiff_t i = 0; i < meanwhile.count; ++i) meanwhile.load(meanwhile.context, i);
        for (std::ptrdiff_t i = 0; i < weights.row_tiles; ++i) {
            const WeightTile* tiles = weights.tiles + i * weights.stride;
            const auto run = [&](auto some, std::ptrdiff_t g) {
                for (int row = 0; row < kTileRows; row += kRowsAtOnce) {
                    some(tiles, row, tokens.tiles + g * tokens.stride, tokens.stride, blocks, first, sums + i * stride + g);
                }
            };
            std::ptrdiff_t g = 0;
            for (; tokens.token_tiles - g >= 2; g += 2) run(block<2>, g);
            if (g < tokens.token_tiles) run(block<1>, g);
        }
    }
};

}  // namespace

const TileKernels kAvx512Bf16Tiles = tile_kernels_over<Avx512Bf16Products>();

}  // namespace moe_surgery::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
#endif
