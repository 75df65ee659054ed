// The experts of one layer: every chosen expert's weights are read once, for all tokens that chose it.
#include <algorithm>
#include <utility>

#include "bits.hpp"
#include "choices.hpp"
#include "pool.hpp"
#include "scratch.hpp"

namespace moe_surgery::cpu {
namespace {

// Rows of a piece; those of gate_up produce one block of 32 activations.
constexpr std::ptrdiff_t kUpRows = 64;
constexpr std::ptrdiff_t kDownRows = 64;
// Transposed weights are read in long runs along a column.
constexpr std::ptrdiff_t kTransposedRows = 1024;
constexpr std::ptrdiff_t kPairsAtOnce = 16;

// Activations in the layout that a matrix takes, one entry per row.
struct Inputs {
    Inputs(bool packed, std::ptrdiff_t count, std::ptrdiff_t columns)
        : packed(packed), columns(columns), width(packed ? act_blocks_of(columns) : columns) {
        if (packed) {
            act_blocks.resize(count * width);
        } else {
            floats.resize(count * width);
        }
    }

    void set(const Kernels& kernels, std::ptrdiff_t i, const float* x) {
        if (packed) {
            kernels.quantize(x, columns, act_blocks.get() + i * width);
        } else {
            std::copy_n(x, columns, floats.get() + i * width);
        }
    }

    bool packed;
    std::ptrdiff_t columns, width;
    Scratch<float> floats;
    Scratch<ActBlock512> act_blocks;
};

// h[p - begin][r - first] = rows first..last of the group's expert times the activations of its pairs, plus
// bias. `of(pair)` is the entry of `x` that it reads.
template <class Of>
void multiply(const Kernels& kernels, const ExpertMatrix& matrix, std::ptrdiff_t stored_expert, std::ptrdiff_t begin,
              std::ptrdiff_t end, std::ptrdiff_t first, std::ptrdiff_t last, const Inputs& x, Of of, float* h,
              std::ptrdiff_t h_stride) {
    const std::ptrdiff_t count = end - begin;
    if (matrix.packed) {
        Quantized rows[kPairsAtOnce];
        for (std::ptrdiff_t i = 0; i < count; ++i) rows[i] = x.act_blocks.get() + of(begin + i) * x.width;
        Mxfp4Rows weight = matrix.mxfp4;
        weight.blocks += stored_expert * matrix.expert_block_stride;
        weight.scales += stored_expert * matrix.expert_scale_stride;
        kernels.mxfp4_rows(weight, first, last, rows, count, h, h_stride);
    } else {
        const float* rows[kPairsAtOnce];
        for (std::ptrdiff_t i = 0; i < count; ++i) rows[i] = x.floats.get() + of(begin + i) * x.width;
        DenseRows weight = matrix.dense;
        weight.data += stored_expert * matrix.expert_stride;
        kernels.dense_transposed(weight, first, last, rows, count, h, h_stride);
    }
    Values bias = matrix.bias;
    bias.data += bytes_of(bias.dtype) * stored_expert * matrix.rows;
    for (std::ptrdiff_t i = 0; i < count; ++i) add_values(bias, first, last, h + i * h_stride);
}

}  // namespace

void Engine::experts(const float* x, const Routing& routing, const ExpertLayer& layer, float* y,
                     const Measures* measures) const {
    const ExpertMatrix &up = layer.gate_up, &down = layer.down;
    const Choices choices = choices_of(routing, std::min(up.experts, down.experts));
    if (choices.pairs.empty()) return;
    const auto has_tiles = [](const ExpertMatrix& matrix) { return matrix.packed || matrix.dense.dtype == Dtype::bf16; };
    const SlotOutputs outputs(kernels_, choices, down.rows, y, measures);
    tiles_ && has_tiles(up) && has_tiles(down) ? tiled_experts(x, choices, layer, outputs)
                                               : row_experts(x, choices, layer, outputs);
}

void Engine::row_experts(const float* x, const Choices& choices, const ExpertLayer& layer,
                         const SlotOutputs& outputs) const {
    const Routing& routing = choices.routing;
    const std::vector<Pair>& pairs = choices.pairs;
    const std::vector<Group>& groups = choices.groups;
    const ExpertMatrix &up = layer.gate_up, &down = layer.down;
    const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(pairs.size()), experts = static_cast<std::ptrdiff_t>(groups.size());
    const std::ptrdiff_t hidden = down.rows, intermediate = up.rows / 2;
    const std::ptrdiff_t columns = up.packed ? up.mxfp4.columns : up.dense.columns;
    const std::ptrdiff_t up_rows = up.packed ? kUpRows : kTransposedRows;
    const std::ptrdiff_t down_rows = down.packed ? kDownRows : kTransposedRows;

    Inputs inputs(up.packed, routing.tokens, columns), activations(down.packed, count, intermediate);
    const Scratch<float> z(count * intermediate);
    const std::ptrdiff_t scratch_size = kPairsAtOnce * std::max(up_rows, down_rows);
    const Scratch<float> scratch(scratch_size * threads_);
    const std::ptrdiff_t up_pieces = (up.rows + up_rows - 1) / up_rows;
    const std::ptrdiff_t down_pieces = (hidden + down_rows - 1) / down_rows;

    const auto load_inputs = [&](std::ptrdiff_t t, int) { inputs.set(kernels_, t, x + t * columns); };
    const auto compute_gate_up = [&](std::ptrdiff_t piece, int thread) {
        const Group& group = groups[static_cast<std::size_t>(piece / up_pieces)];
        const std::ptrdiff_t first = piece % up_pieces * up_rows, last = std::min(up.rows, first + up_rows);
        float* h = scratch.get() + scratch_size * thread;
        const auto token = [&](std::ptrdiff_t i) { return pairs[static_cast<std::size_t>(i)].token; };
        for (std::ptrdiff_t p = group.begin; p < group.end; p += kPairsAtOnce) {
            const std::ptrdiff_t end = std::min(group.end, p + kPairsAtOnce);
            multiply(kernels_, up, group.stored_expert, p, end, first, last, inputs, token, h, up_rows);
            for (std::ptrdiff_t i = p; i < end; ++i) {
                kernels_.swiglu(h + (i - p) * up_rows, (last - first) / 2, layer.limit, layer.alpha,
                                z.get() + i * intermediate + first / 2);
            }
        }
    };
    // A block of 32 may come from two pieces, so they are quantized once all are there.
    const auto load_activations = [&](std::ptrdiff_t i, int) { activations.set(kernels_, i, z.get() + i * intermediate); };
    const auto compute_down = [&](std::ptrdiff_t piece, int thread) {
        const Group& group = groups[static_cast<std::size_t>(piece / down_pieces)];
        const std::ptrdiff_t first = piece % down_pieces * down_rows, last = std::min(hidden, first + down_rows);
        float* h = scratch.get() + scratch_size * thread;
        const auto identity = [](std::ptrdiff_t i) { return i; };
        for (std::ptrdiff_t p = group.begin; p < group.end; p += kPairsAtOnce) {
            const std::ptrdiff_t end = std::min(group.end, p + kPairsAtOnce);
            multiply(kernels_, down, group.stored_expert, p, end, first, last, activations, identity, h, down_rows);
            for (std::ptrdiff_t i = p; i < end; ++i) {
                const Pair& pair = pairs[static_cast<std::size_t>(i)];
                const float factor = outputs.factor(pair);
                const float* from = h + (i - p) * down_rows;
                float* slot_output = outputs.of(pair);
                for (std::ptrdiff_t r = first; r < last; ++r) slot_output[r] = factor * from[r - first];
            }
        }
    };
    std::vector<Phase> phases = {{routing.tokens, load_inputs},
                                 {experts * up_pieces, compute_gate_up},
                                 {count, load_activations},
                                 {experts * down_pieces, compute_down}};
    outputs.append_phases(phases);
    Pool::shared().run(threads_, std::move(phases));
}

}  // namespace moe_surgery::cpu
