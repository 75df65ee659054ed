// How an expert's products in tiles are computed: in BF16, or for MXFP4 in integers.
#pragma once

#include <memory>
#include <vector>

#include "choices.hpp"
#include "tiled.hpp"

namespace moe_surgery::cpu {

// Tiles of the tokens of one expert that are computed together: tiles first .. last of a wave, whose tokens are
// those of pairs[pair .. pair_end).
struct Chunk {
    std::ptrdiff_t stored_expert, first, last, pair, pair_end;

    std::ptrdiff_t tiles() const { return last - first; }
    std::ptrdiff_t pair_of(std::ptrdiff_t tile) const { return pair + (tile - first) * kTileTokens; }
    std::ptrdiff_t tokens_in(std::ptrdiff_t tile) const { return std::min(kTileTokens, pair_end - pair_of(tile)); }
};

// What all chunks of a call have in common.
struct TiledExperts {
    const TileKernels& kernels;
    const ExpertLayer& layer;
    const float* x;  // [tokens, columns]
    const std::vector<Pair>& pairs;
    std::ptrdiff_t most_tiles;  // of a wave
    int threads;

    std::ptrdiff_t columns() const { return layer.gate_up.packed ? layer.gate_up.mxfp4.columns : layer.gate_up.dense.columns; }
    std::ptrdiff_t intermediate() const { return layer.gate_up.rows / 2; }
    // The rows of x that the tokens of a tile have; returns how many.
    std::ptrdiff_t inputs(const Chunk& chunk, std::ptrdiff_t tile, const float** rows) const {
        const std::ptrdiff_t count = chunk.tokens_in(tile);
        for (std::ptrdiff_t n = 0; n < count; ++n) {
            rows[n] = x + pairs[static_cast<std::size_t>(chunk.pair_of(tile) + n)].token * columns();
        }
        return count;
    }
};

// The steps of a chunk, each after the whole of the one before. `part` of `parts` is a share of a chunk; sums are those of
// rows first .. last, as multiply_tiles leaves them.
class ExpertForm {
  public:
    virtual ~ExpertForm() = default;
    virtual void split_inputs(const Chunk& chunk, std::ptrdiff_t part, std::ptrdiff_t parts, int thread) const = 0;
    virtual void multiply_gate_up(const Chunk& chunk, std::ptrdiff_t first, std::ptrdiff_t last, int thread, SumTile* sums) const = 0;
    // The activations that follow from 64 sums of a tile of tokens, gate and up in turn from `row` on; the last
    // `64 - rows` are missing.
    virtual void activate(std::ptrdiff_t tile, std::ptrdiff_t row, std::ptrdiff_t rows, const SumTile* sums, const float* bias) const = 0;
    virtual void split_activations(const Chunk& chunk, std::ptrdiff_t part, std::ptrdiff_t parts, int thread) const = 0;
    virtual void multiply_down(const Chunk& chunk, std::ptrdiff_t first, std::ptrdiff_t last, int thread, SumTile* sums) const = 0;
};

std::unique_ptr<ExpertForm> bf16_experts(const TiledExperts& experts);
std::unique_ptr<ExpertForm> integer_experts(const TiledExperts& experts);

// Whether an expert's weights are MXFP4 with scales that integers take.
bool fits_integers(const ExpertLayer& layer, std::ptrdiff_t stored_expert);

// The rows of one expert.
inline Mxfp4Rows mxfp4_of(const ExpertMatrix& matrix, std::ptrdiff_t stored_expert) {
    Mxfp4Rows rows = matrix.mxfp4;
    rows.blocks += stored_expert * matrix.expert_block_stride;
    rows.scales += stored_expert * matrix.expert_scale_stride;
    return rows;
}

}  // namespace moe_surgery::cpu
