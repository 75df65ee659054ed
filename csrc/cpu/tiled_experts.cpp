// The experts of a layer in tiles: the tokens that chose an expert are in tiles of their own.
#include <utility>

#include "expert_form.hpp"
#include "pool.hpp"

namespace moe_surgery::cpu {
namespace {

// Rows of gate_up that make a block of activations.
constexpr std::ptrdiff_t kBlockRows = 2 * kTileColumns;

// Tiles of tokens, of all experts, that are computed before the next ones: bounds the memory for their activations.
constexpr std::ptrdiff_t kWaveTiles = 64;
static_assert(kWaveTiles >= kTokenTilesAtOnce);

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

// Of each stored expert that is chosen, the form that its products are computed in.
class Forms {
  public:
    Forms(const TiledExperts& experts, const std::vector<Group>& groups) : which_(static_cast<std::size_t>(groups.back().stored_expert) + 1) {
        std::vector<char> fits(groups.size());
        if (experts.kernels.integers && experts.layer.gate_up.packed) {
            Pool::shared().run(experts.threads, {{static_cast<std::ptrdiff_t>(groups.size()), [&](std::ptrdiff_t i, int) {
                const auto at = static_cast<std::size_t>(i);
                fits[at] = fits_integers(experts.layer, groups[at].stored_expert);
            }}});
        }
        for (std::size_t i = 0; i < groups.size(); ++i) {
            std::unique_ptr<ExpertForm>& form = fits[i] ? integers_ : bf16_;
            if (!form) form = fits[i] ? integer_experts(experts) : bf16_experts(experts);
            which_[static_cast<std::size_t>(groups[i].stored_expert)] = form.get();
        }
    }

    const ExpertForm& of(const Chunk& chunk) const { return *which_[static_cast<std::size_t>(chunk.stored_expert)]; }

  private:
    std::unique_ptr<ExpertForm> bf16_, integers_;
    std::vector<const ExpertForm*> which_;
};

// The bias of an expert's rows first .. last.
void load_bias(const ExpertMatrix& matrix, std::ptrdiff_t stored_expert, std::ptrdiff_t first, std::ptrdiff_t last, float* out) {
    Values bias = matrix.bias;
    bias.data += bytes_of(bias.dtype) * stored_expert * matrix.rows;
    load_bias(bias, first, last, out);
}

}  // namespace

void Engine::tiled_experts(const float* x, const Choices& choices, const ExpertLayer& layer,
                           const SlotOutputs& outputs) const {
    const TileKernels& kernels = *tiles_;
    const ExpertMatrix &up = layer.gate_up, &down = layer.down;
    const std::ptrdiff_t hidden = down.rows;
    const Cut cut = cut_for(threads_, kBlockRows, [&](Cut c) {
        return static_cast<std::ptrdiff_t>(waves_of(choices.groups, c.token_tiles).front().size()) * parts_of(hidden, c.rows);
    });
    const std::vector<Wave> waves = waves_of(choices.groups, cut.token_tiles);
    std::ptrdiff_t most_tiles = 0;
    for (const Wave& wave : waves) most_tiles = std::max(most_tiles, wave.back().last);
    const TiledExperts experts = {kernels, layer, x, choices.pairs, most_tiles, threads_};
    const Forms forms(experts, choices.groups);
    const std::ptrdiff_t up_pieces = parts_of(up.rows, cut.rows), down_pieces = parts_of(hidden, cut.rows);
    const std::ptrdiff_t up_parts = parts_of(experts.columns(), kSplitBlocks * kTileColumns);
    const std::ptrdiff_t down_parts = parts_of(experts.intermediate(), kSplitBlocks * kTileColumns);
    const Scratch<SumTile> all_sums(threads_ * kPieceSums);

    const auto compute_gate_up = [&](const Chunk& chunk, std::ptrdiff_t first, std::ptrdiff_t last, int thread) {
        const ExpertForm& form = forms.of(chunk);
        SumTile* sums = all_sums.get() + thread * kPieceSums;
        form.multiply_gate_up(chunk, first, last, thread, sums);
        float bias[kRowsAtOnce];
        load_bias(up, chunk.stored_expert, first, last, bias);
        for (std::ptrdiff_t tile = chunk.first; tile < chunk.last; ++tile) {
            for (std::ptrdiff_t row = first; row < last; row += kBlockRows) {
                form.activate(tile, row, std::min(kBlockRows, last - row),
                              sums + (row - first) / kTileRows * kTokenTilesAtOnce + tile - chunk.first, bias + row - first);
            }
        }
    };
    const auto compute_down = [&](const Chunk& chunk, std::ptrdiff_t first, std::ptrdiff_t last, int thread) {
        SumTile* sums = all_sums.get() + thread * kPieceSums;
        forms.of(chunk).multiply_down(chunk, first, last, thread, sums);
        float bias[kRowsAtOnce];
        load_bias(down, chunk.stored_expert, first, last, bias);
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
        // `work(chunk, part, thread)` for each of `parts` parts of each chunk.
        const auto append = [&](std::ptrdiff_t parts, auto work) {
            phases.push_back({static_cast<std::ptrdiff_t>(wave.size()) * parts, [&wave, parts, work](std::ptrdiff_t piece, int thread) {
                work(wave[static_cast<std::size_t>(piece / parts)], piece % parts, thread);
            }});
        };
        append(up_parts, [&, up_parts](const Chunk& chunk, std::ptrdiff_t part, int thread) {
            forms.of(chunk).split_inputs(chunk, part, up_parts, thread);
        });
        append(up_pieces, [&](const Chunk& chunk, std::ptrdiff_t piece, int thread) {
            compute_gate_up(chunk, piece * cut.rows, std::min(up.rows, (piece + 1) * cut.rows), thread);
        });
        append(down_parts, [&, down_parts](const Chunk& chunk, std::ptrdiff_t part, int thread) {
            forms.of(chunk).split_activations(chunk, part, down_parts, thread);
        });
        append(down_pieces, [&](const Chunk& chunk, std::ptrdiff_t piece, int thread) {
            compute_down(chunk, piece * cut.rows, std::min(hidden, (piece + 1) * cut.rows), thread);
        });
    }
    outputs.append_phases(phases);
    Pool::shared().run(threads_, std::move(phases));
}

}  // namespace moe_surgery::cpu
