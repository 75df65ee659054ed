// Tile products with AMX. Switched on for this file alone, before any include.
#if defined(__x86_64__)
#include "tiles.hpp"

#if defined(MOE_SURGERY_TILES)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8")
// GCC takes the deliberately undefined operands inside its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "lane_math.inl"
#include "lanes_avx512.inl"
#include "integer_tiles_avx512.inl"
#include "tiles_attention.inl"
#include "tiles_avx512.inl"

namespace moe_surgery::cpu {
namespace {

struct AmxProducts {
    // Eight tiles of 16 rows of 64 bytes.
    struct alignas(64) Config {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static void begin() {
        static constexpr Config kConfig;
        _tile_loadconfig(&kConfig);
    }
    // Without live tiles the system saves less when it switches threads.
    static void end() { _tile_release(); }

    // Other work, a share of it after each of `steps` steps.
    class Shares {
      public:
        Shares(const Meanwhile& work, std::ptrdiff_t steps) : work_(work), steps_(steps) {}

        void step() {
            for (due_ += work_.count; due_ >= steps_; due_ -= steps_) work_.load(work_.context, done_++);
        }

      private:
        const Meanwhile& work_;
        const std::ptrdiff_t steps_;
        std::ptrdiff_t due_ = 0, done_ = 0;
    };

    // Sums of R row tiles times G token tiles, in registers 0 to 3.
    template <int R, int G>
    static inline void load_sums(bool first, const SumTile* sums, std::ptrdiff_t stride) {
        if (first) {
            _tile_zero(0);
            if constexpr (G == 2) _tile_zero(1);
            if constexpr (R == 2) _tile_zero(2);
            if constexpr (R == 2 && G == 2) _tile_zero(3);
        } else {
            _tile_loadd(0, sums, 64);
            if constexpr (G == 2) _tile_loadd(1, sums + 1, 64);
            if constexpr (R == 2) _tile_loadd(2, sums + stride, 64);
            if constexpr (R == 2 && G == 2) _tile_loadd(3, sums + stride + 1, 64);
        }
    }
    template <int R, int G>
    static inline void store_sums(SumTile* sums, std::ptrdiff_t stride) {
        _tile_stored(0, sums, 64);
        if constexpr (G == 2) _tile_stored(1, sums + 1, 64);
        if constexpr (R == 2) _tile_stored(2, sums + stride, 64);
        if constexpr (R == 2 && G == 2) _tile_stored(3, sums + stride + 1, 64);
    }

    // Weights in registers 4 and 5, tokens in 6 and 7.
    template <int R>
    static inline void load_weights(const WeightTile* tiles, std::ptrdiff_t stride) {
        _tile_loadd(4, tiles, 64);
        if constexpr (R == 2) _tile_loadd(5, tiles + stride, 64);
    }
    template <int G>
    static inline void load_tokens(const TokenTile& one, const TokenTile& other) {
        _tile_loadd(6, &one, 64);
        if constexpr (G == 2) _tile_loadd(7, &other, 64);
    }

    template <int R, int G>
    static void block(const WeightPanel& weights, const SplitTile* tokens, std::ptrdiff_t token_stride,
                      std::ptrdiff_t blocks, bool first, SumTile* sums, std::ptrdiff_t stride, Shares& shares) {
        load_sums<R, G>(first, sums, stride);
        for (std::ptrdiff_t b = 0; b < blocks; ++b) {
            const SplitTile &one = tokens[b], &other = tokens[(G - 1) * token_stride + b];
            load_weights<R>(weights.tiles + b, weights.stride);
            load_tokens<G>(one.high, other.high);
            multiply_loaded<R, G>();
            load_tokens<G>(one.low, other.low);
            multiply_loaded<R, G>();
            shares.step();
        }
        store_sums<R, G>(sums, stride);
    }

    // Of weights that are sums of two parts, `rest` tiles apart, without the products of two low parts.
    template <int R, int G>
    static void block_of_sums(const WeightPanel& weights, std::ptrdiff_t rest, const SplitTile* tokens,
                              std::ptrdiff_t token_stride, std::ptrdiff_t blocks, bool first, SumTile* sums,
                              std::ptrdiff_t stride) {
        load_sums<R, G>(first, sums, stride);
        for (std::ptrdiff_t b = 0; b < blocks; ++b) {
            const SplitTile &one = tokens[b], &other = tokens[(G - 1) * token_stride + b];
            load_weights<R>(weights.tiles + b, weights.stride);
            load_tokens<G>(one.low, other.low);
            multiply_loaded<R, G>();
            load_tokens<G>(one.high, other.high);
            multiply_loaded<R, G>();
            load_weights<R>(weights.tiles + rest + b, weights.stride);
            multiply_loaded<R, G>();
        }
        store_sums<R, G>(sums, stride);
    }

    template <int R, int G>
    static inline void multiply_loaded() {
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (G == 2) _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2 && G == 2) _tile_dpbf16ps(3, 5, 7);
    }

    // `pair` for two token tiles at a time, `single` for the last: with the first one's tiles and sums.
    template <class Pair, class Single>
    static inline void for_tokens(const TokenPanel& tokens, SumTile* sums, Pair pair, Single single) {
        std::ptrdiff_t g = 0;
        for (; tokens.token_tiles - g >= 2; g += 2) pair(tokens.tiles + g * tokens.stride, sums + g);
        if (g < tokens.token_tiles) single(tokens.tiles + g * tokens.stride, sums + g);
    }

    static void multiply(const WeightPanel& weights, const TokenPanel& tokens, std::ptrdiff_t blocks, bool first,
                         SumTile* sums, std::ptrdiff_t stride, const Meanwhile& meanwhile) {
        Shares shares(meanwhile, blocks * ((tokens.token_tiles + 1) / 2));
        const auto run = [&](auto block_of) {
            return [&, block_of](const SplitTile* tiles, SumTile* at) {
                block_of(weights, tiles, tokens.stride, blocks, first, at, stride, shares);
            };
        };
        weights.row_tiles == 2 ? for_tokens(tokens, sums, run(block<2, 2>), run(block<2, 1>))
                               : for_tokens(tokens, sums, run(block<1, 2>), run(block<1, 1>));
    }

    static void multiply_sums(const WeightPanel& weights, std::ptrdiff_t rest, const TokenPanel& tokens, std::ptrdiff_t blocks,
                              bool first, SumTile* sums, std::ptrdiff_t stride) {
        const auto run = [&](auto block_of) {
            return [&, block_of](const SplitTile* tiles, SumTile* at) {
                block_of(weights, rest, tiles, tokens.stride, blocks, first, at, stride);
            };
        };
        weights.row_tiles == 2 ? for_tokens(tokens, sums, run(block_of_sums<2, 2>), run(block_of_sums<2, 1>))
                               : for_tokens(tokens, sums, run(block_of_sums<1, 2>), run(block_of_sums<1, 1>));
    }
};

struct AmxIntegers {
    // Sums with high and with low of two row tiles, for one tile of tokens.
    struct alignas(64) Sums {
        std::int32_t high[2][kTileRows][kTileTokens], low[2][kTileRows][kTileTokens];
    };

    template <int R>
    static void block(const CodePanel& weights, const SplitQuads* tokens, std::ptrdiff_t tiles, Sums& out, AmxProducts::Shares& shares) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (R == 2) _tile_zero(2);
        if constexpr (R == 2) _tile_zero(3);
        for (std::ptrdiff_t t = 0; t < tiles; ++t) {
            _tile_loadd(4, weights.tiles + t, 64);
            if constexpr (R == 2) _tile_loadd(5, weights.tiles + kSegmentTiles + t, 64);
            _tile_loadd(6, &tokens[t].high, 64);
            _tile_loadd(7, &tokens[t].low, 64);
            _tile_dpbssd(0, 4, 6);
            if constexpr (R == 2) _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(1, 4, 7);
            if constexpr (R == 2) _tile_dpbssd(3, 5, 7);
            shares.step();
        }
        _tile_stored(0, out.high[0], 64);
        _tile_stored(1, out.low[0], 64);
        if constexpr (R == 2) _tile_stored(2, out.high[1], 64);
        if constexpr (R == 2) _tile_stored(3, out.low[1], 64);
    }

    // The sums of one tile of tokens are added while the next one is multiplied.
    template <int R>
    static void panel(const CodePanel& weights, const QuadPanel& tokens, std::ptrdiff_t tiles, bool first, SumTile* sums,
                      std::ptrdiff_t stride, const Meanwhile& meanwhile) {
        AmxProducts::Shares shares(meanwhile, tiles * tokens.token_tiles);
        Sums products[2];
        const auto add = [&](std::ptrdiff_t g) {
            const __m512 factors = _mm512_loadu_ps(tokens.factors + g * tokens.factor_stride);
            for (std::ptrdiff_t i = 0; i < R; ++i) {
                IntegerLayout::add(products[g % 2].high[i], products[g % 2].low[i], weights.factors + i * kTileRows, factors, first,
                                   sums[i * stride + g]);
            }
        };
        for (std::ptrdiff_t g = 0; g < tokens.token_tiles; ++g) {
            block<R>(weights, tokens.tiles + g * tokens.stride, tiles, products[g % 2], shares);
            if (g) add(g - 1);
        }
        add(tokens.token_tiles - 1);
    }

    static void multiply(const CodePanel& weights, const QuadPanel& tokens, std::ptrdiff_t tiles, bool first, SumTile* sums,
                         std::ptrdiff_t stride, const Meanwhile& meanwhile) {
        weights.row_tiles == 2 ? panel<2>(weights, tokens, tiles, first, sums, stride, meanwhile)
                               : panel<1>(weights, tokens, tiles, first, sums, stride, meanwhile);
    }
};

}  // namespace

static const IntegerKernels kAmxIntegers = {IntegerLayout::columns, IntegerLayout::quantize, IntegerLayout::codes,
                                            AmxIntegers::multiply, IntegerLayout::swiglu};
const TileKernels kAmxTiles = tile_kernels_over<AmxProducts>(TileAttention<AmxProducts>::key_tiles,
                                                             TileAttention<AmxProducts>::attend, &kAmxIntegers);

}  // namespace moe_surgery::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
#endif
