// The experts of a layer in tiles: the tokens that chose an expert are split for it, in tiles of their own, and
// what its first product gives becomes tiles of the second without another layout between them.
#include <utility>

#include "choices.hpp"
#include "pool.hpp"
#include "tiled.hpp"

namespace moe_surgery::cpu {
namespace {

// Rows of gate_up that make a block of activations.
constexpr std::ptrdiff_t kBlockRows = 2 * kTileColumns;

// Tiles of tokens, of all experts, that are computed before the next ones: bounds the memory for their activations.
constexpr std::ptrdiff_t kWaveTiles = 64;
static_assert(kWaveTiles >= kTokenTilesAtOnce);

// Tiles of the tokens of one expert that are computed together: tiles first .. last of a wave, whose tokens are
// those of pairs[pair .. pair_end).
struct Chunk {
    std::ptrdiff_t stored_expert, first, last, pair, pair_end;

    std::ptrdiff_t tiles() const { return last - first; }
    std::ptrdiff_t pair_of(std::ptrdiff_t tile) const { return pair + (tile - first) * kTileTokens; }
    std::ptrdiff_t tokens_in(std::ptrdiff_t tile) const { return std::min(kTileTokens, pair_end - pair_of(tile)); }
};
using Wave = std::vector<Chunk>;

std::vector<Wave> waves_of(const std::vector<Group>& groups, std::ptrdiff_t token_tiles) {
    std::vector<Wave> waves(1);
    for (const Group& group : groups) {
        const std::ptrdiff_t tiles = tiles_of(group.end - group.begin, kTileTokens);
        for (std::ptrdiff_t i = 0; i < parts_of(tiles, token_tiles); ++i) {
            const Part part = part_of(tiles, token_tiles, i);
            const std::ptrdiff_t count = part.last - part.first;
            std::ptrdiff_t before = waves.back().empty() ? 0 : waves.back().back().last;
            if (before + count > kWaveTiles) {
                waves.emplace_back();
                before = 0;
            }
            waves.back().push_back({group.stored_expert, before, before + count, group.begin + part.first * kTileTokens,
                                    std::min(group.end, group.begin + part.last * kTileTokens)});
        }
    }
    return waves;
}

// The weight of one expert: its rows as tiles, and its bias.
struct ExpertRows {
    ExpertRows(const ExpertMatrix& matrix, std::ptrdiff_t stored_expert)
        : packed(matrix.packed), mxfp4(matrix.mxfp4), dense(matrix.dense), bias(matrix.bias) {
        if (packed) {
            mxfp4.blocks += stored_expert * matrix.expert_block_stride;
            mxfp4.scales += stored_expert * matrix.expert_scale_stride;
        } else {
            dense.data += stored_expert * matrix.expert_stride;
        }
        bias.data += bytes_of(bias.dtype) * stored_expert * matrix.rows;
    }

    void multiply(const TileKernels& kernels, std::ptrdiff_t first, std::ptrdiff_t last, const TokenPanel& tokens,
                  std::ptrdiff_t blocks, WeightTile* weights, SumTile* sums) const {
        const auto load = [&](std::ptrdiff_t row, std::ptrdiff_t rows, std::ptrdiff_t b, std::ptrdiff_t end, WeightTile* tiles) {
            packed ? kernels.mxfp4(mxfp4, row, rows, b, end, tiles) : kernels.transposed(dense, row, rows, b, end, tiles);
        };
        multiply_tiles(kernels, first, last, blocks, tokens, weights, sums, tile_loader(load));
    }

    bool packed;
    Mxfp4Rows mxfp4;
    DenseRows dense;
    Values bias;
};

}  // namespace

void Engine::tiled_experts(const float* x, const Choices& choices, const ExpertLayer& layer,
                           const SlotOutputs& outputs) const {
    const TileKernels& kernels = *tiles_;
    const ExpertMatrix &up = layer.gate_up, &down = layer.down;
    const std::ptrdiff_t hidden = down.rows, intermediate = up.rows / 2;
    const std::ptrdiff_t columns = up.packed ? up.mxfp4.columns : up.dense.columns;
    const std::ptrdiff_t up_blocks = tiles_of(columns, kTileColumns), down_blocks = tiles_of(intermediate, kTileColumns);

    const Cut cut = cut_for(threads_, kBlockRows, [&](Cut c) {
        return static_cast<std::ptrdiff_t>(waves_of(choices.groups, c.token_tiles).front().size()) * parts_of(hidden, c.rows);
    });
    const std::vector<Wave> waves = waves_of(choices.groups, cut.token_tiles);
    std::ptrdiff_t most_tiles = 0;
    for (const Wave& wave : waves) most_tiles = std::max(most_tiles, wave.back().last);
    const std::ptrdiff_t up_pieces = parts_of(up.rows, cut.rows), down_pieces = parts_of(hidden, cut.rows);
    const Scratch<SplitTile> inputs(most_tiles * up_blocks);
    const Scratch<SplitTile> activations(most_tiles * down_blocks);
    TileScratch scratch(threads_);

    const std::ptrdiff_t split_parts = parts_of(up_blocks, kSplitBlocks);
    const auto split_tokens = [&](const Wave& wave, std::ptrdiff_t piece) {
        const Chunk& chunk = wave[static_cast<std::size_t>(piece / split_parts)];
        const Part b = part_of(up_blocks, kSplitBlocks, piece % split_parts);
        for (std::ptrdiff_t tile = chunk.first; tile < chunk.last; ++tile) {
            const float* rows[kTileTokens];
            for (std::ptrdiff_t n = 0; n < chunk.tokens_in(tile); ++n) {
                rows[n] = x + choices.pairs[static_cast<std::size_t>(chunk.pair_of(tile) + n)].token * columns;
            }
            kernels.split(rows, chunk.tokens_in(tile), columns, b.first, b.last, inputs.get() + tile * up_blocks + b.first);
        }
    };
    const auto compute_gate_up = [&](const Wave& wave, std::ptrdiff_t piece, int thread) {
        const Chunk& chunk = wave[static_cast<std::size_t>(piece / up_pieces)];
        const std::ptrdiff_t first = piece % up_pieces * cut.rows, last = std::min(up.rows, first + cut.rows);
        const ExpertRows weight(up, chunk.stored_expert);
        SumTile* sums = scratch.sums(thread);
        weight.multiply(kernels, first, last, {inputs.get() + chunk.first * up_blocks, up_blocks, chunk.tiles()},
                        up_blocks, scratch.weights(thread), sums);
        float bias[kRowsAtOnce];
        load_bias(weight.bias, first, last, bias);
        for (std::ptrdiff_t tile = chunk.first; tile < chunk.last; ++tile) {
            for (std::ptrdiff_t row = first; row < last; row += kBlockRows) {
                kernels.swiglu(sums + (row - first) / kTileRows * kTokenTilesAtOnce + tile - chunk.first,
                               kTokenTilesAtOnce, std::min(kBlockRows, last - row), bias + row - first,
                               {layer.limit, layer.alpha}, activations.get() + tile * down_blocks + row / kBlockRows);
            }
        }
    };
    const auto compute_down = [&](const Wave& wave, std::ptrdiff_t piece, int thread) {
        const Chunk& chunk = wave[static_cast<std::size_t>(piece / down_pieces)];
        const std::ptrdiff_t first = piece % down_pieces * cut.rows, last = std::min(hidden, first + cut.rows);
        const ExpertRows weight(down, chunk.stored_expert);
        SumTile* sums = scratch.sums(thread);
        weight.multiply(kernels, first, last, {activations.get() + chunk.first * down_blocks, down_blocks, chunk.tiles()},
                        down_blocks, scratch.weights(thread), sums);
        float bias[kRowsAtOnce];
        load_bias(weight.bias, first, last, bias);
        for (std::ptrdiff_t tile = chunk.first; tile < chunk.last; ++tile) {
            const std::ptrdiff_t tokens = chunk.tokens_in(tile);
            const Pair* pairs = choices.pairs.data() + chunk.pair_of(tile);
            float factors[kTileTokens];
            for (std::ptrdiff_t n = 0; n < tokens; ++n) factors[n] = outputs.factor(pairs[n]);
            for (std::ptrdiff_t row = first; row < last; row += kTileRows) {
                float* out[kTileTokens];
                for (std::ptrdiff_t n = 0; n < tokens; ++n) out[n] = outputs.of(pairs[n]) + row;
                kernels.store(sums[(row - first) / kTileRows * kTokenTilesAtOnce + tile - chunk.first],
                              std::min(kTileRows, last - row), tokens, bias + row - first, factors, out);
            }
        }
    };
    std::vector<Phase> phases;
    for (const Wave& wave : waves) {
        const std::ptrdiff_t chunks = static_cast<std::ptrdiff_t>(wave.size());
        phases.push_back({chunks * split_parts, [&](std::ptrdiff_t piece, int) { split_tokens(wave, piece); }});
        phases.push_back({chunks * up_pieces, [&](std::ptrdiff_t piece, int thread) { compute_gate_up(wave, piece, thread); }});
        phases.push_back({chunks * down_pieces, [&](std::ptrdiff_t piece, int thread) { compute_down(wave, piece, thread); }});
    }
    outputs.append_phases(phases);
    Pool::shared().run(threads_, std::move(phases));
}

}  // namespace moe_surgery::cpu
