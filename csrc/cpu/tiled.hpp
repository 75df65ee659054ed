// Products in tiles: how they are cut, and the loops over tiles that one thread runs for a piece.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "bits.hpp"
#include "kernels.hpp"
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

// What a thread needs for its pieces.
class TileScratch {
  public:
    explicit TileScratch(int threads)
        : weights_(new WeightTile[static_cast<std::size_t>(threads * kWeights)]),
          sums_(new SumTile[static_cast<std::size_t>(threads * kSums)]) {}

    WeightTile* weights(int thread) { return weights_.get() + thread * kWeights; }
    SumTile* sums(int thread) { return sums_.get() + thread * kSums; }

  private:
    static constexpr std::ptrdiff_t kWeights = 2 * kPanelTiles;
    static constexpr std::ptrdiff_t kSums = kRowsAtOnce / kTileRows * kTokenTilesAtOnce;
    std::unique_ptr<WeightTile[]> weights_;
    std::unique_ptr<SumTile[]> sums_;
};

// sums[i * kTokenTilesAtOnce + g] = rows first + 16 i .. of a weight times token tile g, for rows first .. last.
// `load(part, row, rows, first block, last block, tiles)` makes tiles of at most 16 rows, of each of the `parts` that a
// weight is the sum of. While a panel of at most 32 rows is
// multiplied the next one is loaded, a tile at a time.
template <class Load>
void multiply_tiles(const TileKernels& kernels, std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t blocks,
                    const TokenPanel& tokens, WeightTile* weights, SumTile* sums, Load load, std::ptrdiff_t parts = 1) {
    // Panels in order: all rows for some blocks, then for the next ones.
    struct Panel {
        const Load* load;
        std::ptrdiff_t part, row, last;
        Part blocks;
        WeightTile* tiles;

        std::ptrdiff_t width() const { return blocks.last - blocks.first; }
        std::ptrdiff_t row_tiles() const { return std::min<std::ptrdiff_t>(2, tiles_of(last - row, kTileRows)); }
        void load_tile(std::ptrdiff_t i) const {
            const std::ptrdiff_t tile = i / width(), b = i % width(), start = row + tile * kTileRows;
            (*load)(part, start, std::min(kTileRows, last - start), blocks.first + b, blocks.first + b + 1,
                 tiles + tile * kBlocksAtOnce + b);
        }
    };
    const std::ptrdiff_t panels = parts_of(last - first, kPanelRows), widths = parts_of(blocks, kBlocksAtOnce);
    const std::ptrdiff_t steps = panels * widths * parts;
    const auto panel_of = [&](std::ptrdiff_t step) {
        return Panel{&load, step / (panels * widths), first + step % panels * kPanelRows, last,
                     part_of(blocks, kBlocksAtOnce, step / panels % widths), weights + step % 2 * kPanelTiles};
    };
    Panel panel = panel_of(0);
    for (std::ptrdiff_t i = 0; i < panel.row_tiles() * panel.width(); ++i) panel.load_tile(i);
    kernels.begin();
    for (std::ptrdiff_t step = 0; step < steps; ++step) {
        const Panel next = panel_of(std::min(step + 1, steps - 1));
        const std::ptrdiff_t tiles_ahead = step + 1 < steps ? next.row_tiles() * next.width() : 0;
        const auto load_next = [](const void* context, std::ptrdiff_t i) { static_cast<const Panel*>(context)->load_tile(i); };
        const Part b = panel.blocks;
        kernels.multiply({panel.tiles, kBlocksAtOnce, panel.row_tiles()},
                         {tokens.tiles + b.first, tokens.stride, tokens.token_tiles}, panel.width(), step < panels,
                         sums + (panel.row - first) / kTileRows * kTokenTilesAtOnce, kTokenTilesAtOnce,
                         {tiles_ahead, &next, load_next});
        panel = next;
    }
    kernels.end();
}

// bias[0 .. last - first) in float32, zeros where there is none.
inline void load_bias(const Values& bias, std::ptrdiff_t first, std::ptrdiff_t last, float* out) {
    std::fill(out, out + (last - first), 0.0f);
    add_values(bias, first, last, out);
}

}  // namespace moe_surgery::cpu
