// Experts in BF16: what the first product gives becomes tiles of the second without another layout between them.
#include "expert_form.hpp"

namespace moe_surgery::cpu {
namespace {

class Bf16Experts final : public ExpertForm {
  public:
    explicit Bf16Experts(const TiledExperts& experts)
        : experts_(experts), up_blocks_(tiles_of(experts.columns(), kTileColumns)),
          down_blocks_(tiles_of(experts.intermediate(), kTileColumns)), inputs_(experts.most_tiles * up_blocks_),
          activations_(experts.most_tiles * down_blocks_), weights_(experts.threads * kPieceWeights) {}

    void split_inputs(const Chunk& chunk, std::ptrdiff_t part, std::ptrdiff_t parts, int) const override {
        const std::ptrdiff_t first = up_blocks_ * part / parts, last = up_blocks_ * (part + 1) / parts;
        for (std::ptrdiff_t tile = chunk.first; tile < chunk.last; ++tile) {
            const float* rows[kTileTokens];
            const std::ptrdiff_t count = experts_.inputs(chunk, tile, rows);
            experts_.kernels.split(rows, count, experts_.columns(), first, last, inputs_.get() + tile * up_blocks_ + first);
        }
    }

    void multiply_gate_up(const Chunk& chunk, std::ptrdiff_t first, std::ptrdiff_t last, int thread, SumTile* sums) const override {
        multiply(experts_.layer.gate_up, chunk, inputs_, up_blocks_, first, last, thread, sums);
    }

    void activate(std::ptrdiff_t tile, std::ptrdiff_t row, std::ptrdiff_t rows, const SumTile* sums, const float* bias) const override {
        experts_.kernels.swiglu(sums, kTokenTilesAtOnce, rows, bias, {experts_.layer.limit, experts_.layer.alpha},
                                activations_.get() + tile * down_blocks_ + row / (2 * kTileColumns));
    }

    void split_activations(const Chunk&, std::ptrdiff_t, std::ptrdiff_t, int) const override {}

    void multiply_down(const Chunk& chunk, std::ptrdiff_t first, std::ptrdiff_t last, int thread, SumTile* sums) const override {
        multiply(experts_.layer.down, chunk, activations_, down_blocks_, first, last, thread, sums);
    }

  private:
    void multiply(const ExpertMatrix& matrix, const Chunk& chunk, const Scratch<SplitTile>& tokens, std::ptrdiff_t blocks,
                  std::ptrdiff_t first, std::ptrdiff_t last, int thread, SumTile* sums) const {
        const TileKernels& kernels = experts_.kernels;
        const TokenPanel panel = {tokens.get() + chunk.first * blocks, blocks, chunk.tiles()};
        WeightTile* weights = weights_.get() + thread * kPieceWeights;
        if (matrix.packed) {
            const Mxfp4Rows rows = mxfp4_of(matrix, chunk.stored_expert);
            const auto load = [&](std::ptrdiff_t row, std::ptrdiff_t count, std::ptrdiff_t b, std::ptrdiff_t end, WeightTile* out) {
                kernels.mxfp4(rows, row, count, b, end, out);
            };
            multiply_tiles(kernels, first, last, blocks, panel, weights, sums, tile_loader(load));
        } else {
            DenseRows rows = matrix.dense;
            rows.data += chunk.stored_expert * matrix.expert_stride;
            const auto load = [&](std::ptrdiff_t row, std::ptrdiff_t count, std::ptrdiff_t b, std::ptrdiff_t end, WeightTile* out) {
                kernels.transposed(rows, row, count, b, end, out);
            };
            multiply_tiles(kernels, first, last, blocks, panel, weights, sums, tile_loader(load));
        }
    }

    const TiledExperts experts_;
    const std::ptrdiff_t up_blocks_, down_blocks_;
    const Scratch<SplitTile> inputs_, activations_;
    const Scratch<WeightTile> weights_;
};

}  // namespace

std::unique_ptr<ExpertForm> bf16_experts(const TiledExperts& experts) { return std::make_unique<Bf16Experts>(experts); }

}  // namespace moe_surgery::cpu
