// Products with dense weights in tiles: tokens are split once, for all products.
#include "engine.hpp"
#include "pool.hpp"
#include "tiled.hpp"

namespace moe_surgery::cpu {
namespace {

// Loads a row at a time, of the blocks that lie together.
struct Q8_0Loader {
    const TileKernels& kernels;
    const Product& product;

    static std::ptrdiff_t groups(const Panel& panel) { return tiles_of(panel.width(), kLanes); }
    std::ptrdiff_t count(const Panel& panel) const { return panel.row_tiles() * kTileRows * groups(panel); }
    void operator()(const Panel& panel, std::ptrdiff_t i) const {
        const std::ptrdiff_t r = i / groups(panel), b = i % groups(panel) * kLanes, row = panel.row + r;
        const DenseRows& weight = product.weight;
        kernels.q8_0(weight, row < panel.last ? weight.data + row * weight.stride : nullptr, panel.blocks.first + b,
                     std::min(panel.blocks.last, panel.blocks.first + b + kLanes), panel.part, r % kTileRows,
                     panel.tiles + r / kTileRows * kBlocksAtOnce + b);
    }
};
static_assert(kBlocksAtOnce % kLanes == 0);

}  // namespace

void Engine::tiled_products(const float* x, std::ptrdiff_t tokens, const std::vector<Product>& products) const {
    const TileKernels& kernels = *tiles_;
    const std::ptrdiff_t columns = products.front().weight.columns, blocks = tiles_of(columns, kTileColumns);
    const std::ptrdiff_t token_tiles = tiles_of(tokens, kTileTokens), split_parts = parts_of(blocks, kSplitBlocks);
    const Scratch<SplitTile> split(token_tiles * blocks);
    const auto tokens_in = [&](std::ptrdiff_t tile) { return std::min(kTileTokens, tokens - tile * kTileTokens); };

    const auto split_tokens = [&](std::ptrdiff_t piece, int) {
        const std::ptrdiff_t tile = piece / split_parts;
        const Part b = part_of(blocks, kSplitBlocks, piece % split_parts);
        const float* rows[kTileTokens];
        for (std::ptrdiff_t n = 0; n < tokens_in(tile); ++n) rows[n] = x + (tile * kTileTokens + n) * columns;
        kernels.split(rows, tokens_in(tile), columns, b.first, b.last, split.get() + tile * blocks + b.first);
    };

    // Pieces of a product: its parts of the tokens for each part of its rows.
    const Cut cut = cut_for(threads_, kPanelRows, [&](Cut c) {
        std::ptrdiff_t count = 0;
        for (const Product& product : products) count += parts_of(product.rows, c.rows);
        return count * parts_of(token_tiles, c.token_tiles);
    });
    const std::ptrdiff_t token_parts = parts_of(token_tiles, cut.token_tiles);
    std::vector<std::ptrdiff_t> ends;
    for (const Product& product : products) {
        ends.push_back((ends.empty() ? 0 : ends.back()) + parts_of(product.rows, cut.rows) * token_parts);
    }
    const Scratch<WeightTile> weights(threads_ * kPieceWeights);
    const Scratch<SumTile> all_sums(threads_ * kPieceSums);
    const auto multiply = [&](std::ptrdiff_t piece, int thread) {
        const auto which = std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin();
        const Product& product = products[static_cast<std::size_t>(which)];
        if (which) piece -= ends[static_cast<std::size_t>(which - 1)];
        const std::ptrdiff_t first = piece / token_parts * cut.rows, last = std::min(product.rows, first + cut.rows);
        const Part part = part_of(token_tiles, cut.token_tiles, piece % token_parts);
        SumTile* sums = all_sums.get() + thread * kPieceSums;
        WeightTile* tiles = weights.get() + thread * kPieceWeights;
        const TokenPanel panel = {split.get() + part.first * blocks, blocks, part.last - part.first};
        if (product.weight.dtype == Dtype::q8_0) {
            multiply_tiles(kernels, first, last, blocks, panel, tiles, sums, Q8_0Loader{kernels, product}, 2);
        } else {
            const auto load = [&](std::ptrdiff_t row, std::ptrdiff_t rows, std::ptrdiff_t b, std::ptrdiff_t end, WeightTile* out) {
                kernels.dense(product.weight, row, rows, b, end, out);
            };
            multiply_tiles(kernels, first, last, blocks, panel, tiles, sums, tile_loader(load));
        }
        float bias[kRowsAtOnce];
        load_bias(product.bias, first, last, bias);
        static constexpr float kOnes[kTileTokens] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        for (std::ptrdiff_t tile = part.first; tile < part.last; ++tile) {
            for (std::ptrdiff_t row = first; row < last; row += kTileRows) {
                float* out[kTileTokens];
                for (std::ptrdiff_t n = 0; n < tokens_in(tile); ++n) {
                    out[n] = product.y + (tile * kTileTokens + n) * product.rows + row;
                }
                kernels.store(sums[(row - first) / kTileRows * kTokenTilesAtOnce + tile - part.first],
                              std::min(kTileRows, last - row), tokens_in(tile), bias + row - first, kOnes, out);
            }
        }
    };
    Pool::shared().run(threads_, {{token_tiles * split_parts, split_tokens}, {ends.back(), multiply}});
}

}  // namespace moe_surgery::cpu
