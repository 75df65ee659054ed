// Tile products with AMX. Switched on for this file alone, before any include.
#if defined(__x86_64__)
#include "tiles.hpp"

#if defined(MOE_SURGERY_TILES)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16")
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

    // R row tiles times G token tiles: sums in registers 0 to 3, weights in 4 and 5, tokens in 6 and 7.
    template <int R, int G>
    static void block(const WeightPanel& weights, const SplitTile* tokens, std::ptrdiff_t token_stride,
                      std::ptrdiff_t blocks, bool first, SumTile* sums, std::ptrdiff_t stride, Shares& shares) {
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
        for (std::ptrdiff_t b = 0; b < blocks; ++b) {
            const SplitTile* second = tokens + token_stride + b;
            _tile_loadd(4, weights.tiles + b, 64);
            if constexpr (R == 2) _tile_loadd(5, weights.tiles + weights.stride + b, 64);
            _tile_loadd(6, &tokens[b].high, 64);
            if constexpr (G == 2) _tile_loadd(7, &second->high, 64);
            multiply_loaded<R, G>();
            _tile_loadd(6, &tokens[b].low, 64);
            if constexpr (G == 2) _tile_loadd(7, &second->low, 64);
            multiply_loaded<R, G>();
            shares.step();
        }
        _tile_stored(0, sums, 64);
        if constexpr (G == 2) _tile_stored(1, sums + 1, 64);
        if constexpr (R == 2) _tile_stored(2, sums + stride, 64);
        if constexpr (R == 2 && G == 2) _tile_stored(3, sums + stride + 1, 64);
    }

    template <int R, int G>
    static inline void multiply_loaded() {
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (G == 2) _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2 && G == 2) _tile_dpbf16ps(3, 5, 7);
    }

    static void multiply(const WeightPanel& weights, const TokenPanel& tokens, std::ptrdiff_t blocks, bool first,
                         SumTile* sums, std::ptrdiff_t stride, const Meanwhile& meanwhile) {
        Shares shares(meanwhile, blocks * ((tokens.token_tiles + 1) / 2));
        const auto run = [&](auto pair, auto single) {
            std::ptrdiff_t g = 0;
            for (; tokens.token_tiles - g >= 2; g += 2) {
                pair(weights, tokens.tiles + g * tokens.stride, tokens.stride, blocks, first, sums + g, stride, shares);
            }
            if (g < tokens.token_tiles) {
                single(weights, tokens.tiles + g * tokens.stride, tokens.stride, blocks, first, sums + g, stride, shares);
            }
        };
        weights.row_tiles == 2 ? run(block<2, 2>, block<2, 1>) : run(block<1, 2>, block<1, 1>);
    }
};

}  // namespace

const TileKernels kAmxTiles = tile_kernels_over<AmxProducts>();

}  // namespace moe_surgery::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
#endif
