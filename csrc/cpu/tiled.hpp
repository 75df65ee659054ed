// Products in tiles: how they are cut, and the loops over tiles that one thread runs for a piece.
#pragma once

#include <algorithm>
#include <vector>

#include "bits.hpp"
#include "kernels.hpp"
#include "scratch.hpp"
#include "tiles.hpp"

namespace moe_surgery::cpu {

// A piece's tokens and rows at most, in blocks at most, so that the tokens' tiles of those blocks, the sums and a
// panel of weights stay in a core's second-level cache.
constexpr std::ptrdiff_t kTokenTilesAtOnce = 16;
constexpr std::ptrdiff_t kRowsAtOnce = 256;
constexpr std::ptrdiff_t kBlocksAtOnce = 32;
constexpr std::ptrdiff_t kPanelRows = 2 * kTileRows;
constexpr std::ptrdiff_t kPanelTiles = kPanelRows / kTileRows * kBlocksAtOnce;
// Blocks of one tile of tokens that are split as a piece.
constexpr std::ptrdiff_t kSplitBlocks = 32;

// How large the pieces of a tiled product are.
struct Cut {
    std::ptrdiff_t rows = kRowsAtOnce, token_tiles = kTokenTilesAtOnce;
};

// The largest pieces of which there are at least four for each thread, or the smallest. `pieces(cut)` counts them,
// `least_rows` divides the rows of each.
template <class Pieces>
Cut cut_for(int threads, std::ptrdiff_t least_rows, Pieces pieces) {
    Cut cut;
    while (pieces(cut) < 4 * threads) {
        if (cut.rows > 2 * kPanelRows && cut.rows > least_rows) {
            cut.rows /= 2;
        } else if (cut.token_tiles > 4) {
            cut.token_tiles /= 2;
        } else if (cut.rows > least_rows) {
            cut.rows /= 2;
        } else {
            break;
        }
    }
    return cut;
}

// The part `i` of `count` into as many parts of at most `most` as it takes, about equally large.
struct Part {
    std::ptrdiff_t first, last;
};
inline std::ptrdiff_t parts_of(std::ptrdiff_t count, std::ptrdiff_t most) { return (count + most - 1) / most; }
inline Part part_of(std::ptrdiff_t count, std::ptrdiff_t most, std::ptrdiff_t i) {
    const std::ptrdiff_t parts = parts_of(count, most);
    return {count * i / parts, count * (i + 1) / parts};
}

// What a thread needs for a piece: two panels of weights, and the sums.
constexpr std::ptrdiff_t kPieceWeights = 2 * kPanelTiles;
constexpr std::ptrdiff_t kPieceSums = kRowsAtOnce / kTileRows * kTokenTilesAtOnce;

// A panel of weights: rows `row` to `last`, at most 32, and some blocks, of one of the parts that a weight is the sum of.
// Tile (i, b), row tile i and block blocks.first + b, is tiles[i * kBlocksAtOnce + b].
struct Panel {
    std::ptrdiff_t part, row, last;
    Part blocks;
    WeightTile* tiles;

    std::ptrdiff_t width() const { return blocks.last - blocks.first; }
    std::ptrdiff_t row_tiles() const { return std::min<std::ptrdiff_t>(2, tiles_of(last - row, kTileRows)); }
};

// Loads a panel a tile at a time, by load(row, rows, first block, last block, tiles).
template <class Load>
struct TileLoader {
    Load load;

    std::ptrdiff_t count(const Panel& panel) const { return panel.row_tiles() * panel.width(); }
    void operator()(const Panel& panel, std::ptrdiff_t i) const {
        const std::ptrdiff_t tile = i / panel.width(), b = i % panel.width(), start = panel.row + tile * kTileRows;
        load(start, std::min(kTileRows, panel.last - start), panel.blocks.first + b, panel.blocks.first + b + 1,
             panel.tiles + tile * kBlocksAtOnce + b);
    }
};
template <class Load>
TileLoader<Load> tile_loader(Load load) {
    return {load};
}

// sums[i * kTokenTilesAtOnce + g] = rows first + 16 i .. of a weight, the sum of `parts`, times token tile g, for rows
// first .. last. While a panel is multiplied the next one is loaded: loader(panel, i) for i < loader.count(panel).
template <class Loader>
void multiply_tiles(const TileKernels& kernels, std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t blocks,
                    const TokenPanel& tokens, WeightTile* weights, SumTile* sums, const Loader& loader, std::ptrdiff_t parts = 1) {
    // Panels in order: all rows for some blocks, then for the next ones; and so for each part.
    const std::ptrdiff_t panels = parts_of(last - first, kPanelRows), widths = parts_of(blocks, kBlocksAtOnce);
    const std::ptrdiff_t steps = panels * widths * parts;
    const auto panel_of = [&](std::ptrdiff_t step) {
        const std::ptrdiff_t block = step / panels % widths * kBlocksAtOnce;
        return Panel{step / (panels * widths), first + step % panels * kPanelRows, last,
                     {block, std::min(blocks, block + kBlocksAtOnce)}, weights + step % 2 * kPanelTiles};
    };
    struct Ahead {
        const Loader& loader;
        Panel panel;
    };
    Panel panel = panel_of(0);
    for (std::ptrdiff_t i = 0; i < loader.count(panel); ++i) loader(panel, i);
    kernels.begin();
    for (std::ptrdiff_t step = 0; step < steps; ++step) {
        const Ahead ahead = {loader, panel_of(std::min(step + 1, steps - 1))};
        const auto load_next = [](const void* context, std::ptrdiff_t i) {
            const Ahead& next = *static_cast<const Ahead*>(context);
            next.loader(next.panel, i);
        };
        const Part b = panel.blocks;
        kernels.multiply({panel.tiles, kBlocksAtOnce, panel.row_tiles()},
                         {tokens.tiles + b.first, tokens.stride, tokens.token_tiles}, panel.width(), step < panels,
                         sums + (panel.row - first) / kTileRows * kTokenTilesAtOnce, kTokenTilesAtOnce,
                         {step + 1 < steps ? loader.count(ahead.panel) : 0, &ahead, load_next});
        panel = ahead.panel;
    }
    kernels.end();
}

// bias[0 .. last - first) in float32, zeros where there is none.
inline void load_bias(const Values& bias, std::ptrdiff_t first, std::ptrdiff_t last, float* out) {
    std::fill(out, out + (last - first), 0.0f);
    add_values(bias, first, last, out);
}

}  // namespace moe_surgery::cpu
