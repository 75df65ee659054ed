// Products of many tokens, in BF16: weights are exact, a token's activation is a sum of two BF16 values.
//
// A weight of BF16, and an MXFP4 value with its scale, are BF16 values. An activation x is rounded to BF16 (`high`),
// and so is what is left of it (`low`): their sum is x up to 2^-17 of it. A value of a product is a float32 sum over
// the blocks of 32 columns in their order, of each block first the products with `high`, then those with `low`.
// How the 64 terms of a block are added is the instruction's:
//
//   amx         two chains of fused multiply-adds for each of high and low, from zero, over its even and its odd
//               columns; their sum is added to the value
//   avx512bf16  one chain through the value over the pairs of columns: of each pair high's odd and even column,
//               then low's
//
// A weight of Q8_0 is such a sum too, up to 2^-17 of it: all columns are added with its first part, then with its second.
// Both sets round to nearest and take subnormal numbers for zeros. So a value depends on its row and its token alone, not on
// the tokens beside it, nor on how rows, columns and tokens are cut into pieces.
//
// With AMX, experts of MXFP4 whose scales are not huge are multiplied in integers instead: see integer_tiles.hpp.
//
// A matrix lies in tiles, each as an instruction of AMX takes it. Rows and tokens that are missing are zeros.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

// Compilers that know the instructions: GCC from 11 on has a header for each part of AMX, Clang one for all that we need.
#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<avx512bf16intrin.h>) && (__has_include(<amxbf16intrin.h>) || (defined(__clang__) && __has_include(<amxintrin.h>)))
#define MOE_SURGERY_TILES 1
#endif
#endif

namespace moe_surgery::cpu {

constexpr std::ptrdiff_t kTileRows = 16;    // of weights
constexpr std::ptrdiff_t kTileTokens = 16;
constexpr std::ptrdiff_t kTileColumns = 32;
static_assert(kTileColumns == kBlock && kTileColumns == kGroup);

constexpr std::ptrdiff_t tiles_of(std::ptrdiff_t count, std::ptrdiff_t size) { return (count + size - 1) / size; }

// BF16 weights of 16 rows.
struct alignas(64) WeightTile {
    std::uint16_t rows[kTileRows][kTileColumns];
};

// BF16 activations of 16 tokens: columns 2k and 2k + 1 of token n are pairs[k][n].
struct alignas(64) TokenTile {
    std::uint32_t pairs[kTileColumns / 2][kTileTokens];
};
struct SplitTile {
    TokenTile high, low;
};

// Sums of 16 rows for 16 tokens.
struct alignas(64) SumTile {
    float rows[kTileRows][kTileTokens];
};

// Weights of up to 32 rows: tile (i, b) of row tile i and block b is tiles[i * stride + b].
struct WeightPanel {
    const WeightTile* tiles;
    std::ptrdiff_t stride;
    std::ptrdiff_t row_tiles;  // 1 or 2
};

// Tokens of several tiles: tile (g, b) of token tile g and block b is tiles[g * stride + b].
struct TokenPanel {
    const SplitTile* tiles;
    std::ptrdiff_t stride;
    std::ptrdiff_t token_tiles;
};

// Other work, done by the time `multiply` returns: `load(context, i)` for i in 0 .. count. AMX's products run beside
// other instructions, so that it costs little between them.
struct Meanwhile {
    std::ptrdiff_t count;
    const void* context;
    void (*load)(const void* context, std::ptrdiff_t i);
};

// The experts' activation function; see Kernels::swiglu.
struct Swiglu {
    float limit, alpha;
};

// Attention of long steps: sixteen queries of some heads with the keys of a KeyRange, kTileKeys at a time. Keys, values and
// softmax's weights are sums of two BF16 values, as activations are, and the products of two low ones are left out; keys
// and values that are stored in BF16 are one. The weights of a block are relative to the largest score so far, sink included; when a larger one comes, what was summed is
// scaled. Blocks begin at positions that kTileKeys divides, so that a result does not depend on the queries beside it, nor
// on which keys that it does not see are there.
constexpr std::ptrdiff_t kTileKeys = 64;
constexpr std::ptrdiff_t kKeyBlocks = kTileKeys / kTileColumns;
constexpr std::ptrdiff_t kTileHeads = 8;  // at most

// Where the tiles of a block of keys are: its keys are rows, its values are columns.
struct KeyTiles {
    explicit KeyTiles(const KeyRange& range)
        : parts(range.is_f32 ? 2 : 1), head_blocks(tiles_of(range.head_dim, kTileColumns)),
          head_rows(tiles_of(range.head_dim, kTileRows)) {}

    std::ptrdiff_t count() const { return value(parts, 0); }
    // The first of head_blocks tiles of 16 keys.
    std::ptrdiff_t key(std::ptrdiff_t part, std::ptrdiff_t row_tile) const {
        return (part * (kTileKeys / kTileRows) + row_tile) * head_blocks;
    }
    // The first of kKeyBlocks tiles of 16 values of a head.
    std::ptrdiff_t value(std::ptrdiff_t part, std::ptrdiff_t row_tile) const {
        return key(parts, 0) + (part * head_rows + row_tile) * kKeyBlocks;
    }

    const std::ptrdiff_t parts, head_blocks, head_rows;
};

struct AttentionPiece {
    const float* q;  // of the first head and query; strides in values
    std::ptrdiff_t q_head, q_query;
    float* out;
    std::ptrdiff_t out_head, out_query;
    const float* sinks;
    std::ptrdiff_t heads, queries;
    // The keys that each query attends to, by number: key i of the range is number i + offset.
    std::int32_t first[kTileTokens], last[kTileTokens];
    KeyRange range;
    std::ptrdiff_t offset;
    const WeightTile* tiles;  // of all blocks of the range
    const bool* finite;       // of each block, what key_tiles returned
};

// For one thread; sizes for `heads` heads.
struct AttentionScratch {
    SplitTile* queries;  // [heads, head_blocks]
    SplitTile* weights;  // [heads, kKeyBlocks]
    SumTile* scores;     // [kTileKeys / 16, heads]
    SumTile* sums;       // [head_rows, heads]
};

struct IntegerKernels;  // see integer_tiles.hpp

// All functions take at most 16 rows and 16 tokens; blocks are of 32 columns.
struct TileKernels {
    // Before and after the calls of a thread for one piece of work.
    void (*begin)();
    void (*end)();

    // Blocks first .. last of the tokens at x, into out[0 ..].
    void (*split)(const float* const* x, std::ptrdiff_t tokens, std::ptrdiff_t columns, std::ptrdiff_t first,
                  std::ptrdiff_t last, SplitTile* out);

    // Blocks first .. last of `rows` rows from `row` on, into out[0 ..]: of MXFP4 rows, of BF16 rows, and of a
    // BF16 weight stored transposed.
    void (*mxfp4)(const Mxfp4Rows& weight, std::ptrdiff_t row, std::ptrdiff_t rows, std::ptrdiff_t first,
                  std::ptrdiff_t last, WeightTile* out);
    void (*dense)(const DenseRows& weight, std::ptrdiff_t row, std::ptrdiff_t rows, std::ptrdiff_t first,
                  std::ptrdiff_t last, WeightTile* out);
    void (*transposed)(const DenseRows& weight, std::ptrdiff_t row, std::ptrdiff_t rows, std::ptrdiff_t first,
                       std::ptrdiff_t last, WeightTile* out);

    // Of one row of Q8_0, row `into` of the tiles of up to 16 blocks that lie together (see q8_0_rows). Its values take
    // more bits than BF16 has: rounded to BF16, or with `rest` what that leaves, rounded. Zeros where there is no `row`.
    void (*q8_0)(const DenseRows& weight, const std::uint8_t* row, std::ptrdiff_t first, std::ptrdiff_t last, bool rest,
                 std::ptrdiff_t into, WeightTile* out);

    // sums[i * stride + g] += row tile i times token tile g over `blocks` blocks, or = where `first`.
    void (*multiply)(const WeightPanel& weights, const TokenPanel& tokens, std::ptrdiff_t blocks, bool first,
                     SumTile* sums, std::ptrdiff_t stride, const Meanwhile& meanwhile);

    // A block of the second product's activations: from 64 rows of sums, gate and up in turn, sums[i * stride] each
    // 16 of them; `bias` has 64 values. The last `64 - rows` are missing.
    void (*swiglu)(const SumTile* sums, std::ptrdiff_t stride, std::ptrdiff_t rows, const float* bias,
                   const Swiglu& function, SplitTile* out);

    // out[n][0 .. rows) = (sums of token n + bias) * factors[n].
    void (*store)(const SumTile& sums, std::ptrdiff_t rows, std::ptrdiff_t tokens, const float* bias,
                  const float* factors, float* const* out);

    // Attention, null for a set whose lanes are faster. The tiles of the block of keys from number `first` of the range on,
    // zeros for numbers that it does not have, and for values that are not finite in BF16; returns whether all are.
    bool (*key_tiles)(const KeyRange& range, std::ptrdiff_t first, WeightTile* out);
    void (*attend)(const AttentionPiece& piece, const AttentionScratch& scratch);

    // Integer products of MXFP4 rows, null where the instruction set has none.
    const IntegerKernels* integers;
};

#if defined(MOE_SURGERY_TILES)
extern const TileKernels kAvx512Bf16Tiles;
extern const TileKernels kAmxTiles;
#endif

}  // namespace moe_surgery::cpu
