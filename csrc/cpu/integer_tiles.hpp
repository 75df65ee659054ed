// Products of MXFP4 rows with many tokens, in integers of 8 bits.
//
// Columns are cut into segments of at most 512. In a segment a token's activations are integers of 16 bits, each 256 high
// + low, times a factor: the largest magnitude is kQuantMax. A row's doubled weights are integers of 8 bits times a power
// of two, which is exact: blocks whose scales lie within a factor of 8 below the largest scale of the segment are its band
// 0, those within the next factor of 16 band 1, and so on, and each band is multiplied on its own.
//
// A value of a product is a float32 sum over the segments in their order, of each over its bands: the exact sums of the
// products with high and with low, as floats, are combined by a fused multiply-add, times the row's factor, and added by
// another with the token's. So it depends on its row and its token alone, as in tiles.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "tiles.hpp"

namespace moe_surgery::cpu {

constexpr std::ptrdiff_t kIntegerColumns = 64;  // of a tile
constexpr std::ptrdiff_t kSegmentTiles = 8;     // at most
constexpr std::ptrdiff_t kSegmentColumns = kSegmentTiles * kIntegerColumns;
constexpr std::ptrdiff_t kSegmentBlocks = kSegmentColumns / kBlock;
// Experts with a larger scale are multiplied in BF16: here an integer sum times its row's factor could overflow (from some
// 227 on), and weights that are infinite in BF16 would not be.
constexpr std::uint8_t kLargestScale = 190;
constexpr int kBands = kLargestScale / 4 + 1;

// How `columns` are cut: segment i is tiles first(i) .. first(i + 1).
struct Segments {
    explicit Segments(std::ptrdiff_t columns)
        : columns(columns), tiles(tiles_of(columns, kIntegerColumns)), count(tiles_of(tiles, kSegmentTiles)) {}

    std::ptrdiff_t first(std::ptrdiff_t i) const { return tiles * i / count; }
    std::ptrdiff_t width(std::ptrdiff_t i) const { return first(i + 1) - first(i); }
    std::ptrdiff_t first_column(std::ptrdiff_t i) const { return first(i) * kIntegerColumns; }
    std::ptrdiff_t last_column(std::ptrdiff_t i) const { return std::min(columns, first(i + 1) * kIntegerColumns); }

    const std::ptrdiff_t columns, tiles, count;
};

// Weights of 16 rows.
struct alignas(64) CodeTile {
    std::int8_t rows[kTileRows][kIntegerColumns];
};

// Activations of 16 tokens: columns 4k to 4k + 3 of token n are the bytes of quads[k][n].
struct alignas(64) QuadTile {
    std::uint32_t quads[kIntegerColumns / 4][kTileTokens];
};
struct SplitQuads {
    QuadTile high, low;
};

// Weights of up to 32 rows in a segment: tile (i, t) is tiles[i * kSegmentTiles + t], row r times factors[r].
struct CodePanel {
    const CodeTile* tiles;
    const float* factors;
    std::ptrdiff_t row_tiles;  // 1 or 2
};

// Tokens of several tiles in a segment: tile (g, t) is tiles[g * stride + t], token n times factors[g * factor_stride + n].
struct QuadPanel {
    const SplitQuads* tiles;
    std::ptrdiff_t stride;
    const float* factors;
    std::ptrdiff_t factor_stride;
    std::ptrdiff_t token_tiles;
};

struct IntegerKernels {
    // Columns first .. last, a multiple of 16, of at most 16 tokens at x as out[column - first][token], zeros for missing
    // tokens.
    void (*columns)(const float* const* x, std::ptrdiff_t tokens, std::ptrdiff_t first, std::ptrdiff_t last, float* out);

    // `count` columns [count, 16] of a segment, zeros after them, into its tiles and 16 factors: NaN for a token that has a
    // value that is not finite.
    void (*quantize)(const float* columns, std::ptrdiff_t count, SplitQuads* out, float* factors);

    // Blocks first .. last, a segment, of one row of MXFP4 whose scales are at most kLargestScale: its band `band`, as row
    // `into` of the segment's tiles, and its factor. For band 0 returns a bit for each band that has other weights than 0,
    // where there are several.
    std::uint64_t (*codes)(const Mxfp4Rows& weight, std::ptrdiff_t row, std::ptrdiff_t first, std::ptrdiff_t last, int band,
                           std::ptrdiff_t into, CodeTile* out, float* factor);

    // sums[i * stride + g] += row tile i times token tile g over `tiles` tiles, or = where `first`.
    void (*multiply)(const CodePanel& weights, const QuadPanel& tokens, std::ptrdiff_t tiles, bool first, SumTile* sums,
                     std::ptrdiff_t stride, const Meanwhile& meanwhile);

    // 32 columns [32, 16] of the second product's activations; see TileKernels::swiglu.
    void (*swiglu)(const SumTile* sums, std::ptrdiff_t stride, std::ptrdiff_t rows, const float* bias, const Swiglu& function,
                   float* out);
};

}  // namespace moe_surgery::cpu
