// The experts of one layer: every chosen expert's weights are read once, for all tokens that chose it.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "bits.hpp"
#include "engine.hpp"
#include "pool.hpp"

namespace moe_surgery::cpu {
namespace {

// Rows of a piece: of gate_up two blocks of the activations between, which its thread quantizes.
constexpr std::ptrdiff_t kUpRows = 64;
constexpr std::ptrdiff_t kDownRows = 64;
// Transposed weights are read in long runs of one column's rows.
constexpr std::ptrdiff_t kTransposedRows = 1024;
constexpr std::ptrdiff_t kPairsAtOnce = 16;

// One (token, slot) after the other, by expert: those of an expert are pairs[begin .. end).
struct Group {
    std::ptrdiff_t place, begin, end;
};

struct Pair {
    std::ptrdiff_t place, token, slot;
};

std::vector<Pair> sorted_pairs(const Choice& choice) {
    std::vector<Pair> pairs;
    pairs.reserve(static_cast<std::size_t>(choice.tokens * choice.top_k));
    for (std::ptrdiff_t t = 0; t < choice.tokens; ++t) {
        for (std::ptrdiff_t s = 0; s < choice.top_k; ++s) {
            pairs.push_back({static_cast<std::ptrdiff_t>(choice.ids[t * choice.top_k + s]), t, s});
        }
    }
    std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.place < b.place; });
    return pairs;
}

std::vector<Group> groups_in(const std::vector<Pair>& pairs) {
    std::vector<Group> groups;
    for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(pairs.size()); ++i) {
        const std::ptrdiff_t place = pairs[static_cast<std::size_t>(i)].place;
        if (groups.empty() || groups.back().place != place) groups.push_back({place, i, i});
        groups.back().end = i + 1;
    }
    return groups;
}

// Activations in the form that a matrix takes, one entry a row.
struct Inputs {
    Inputs(bool packed, std::ptrdiff_t count, std::ptrdiff_t columns)
        : packed(packed), columns(columns), width(packed ? spans_of(columns) : columns) {
        if (packed) {
            spans.reset(new Span[static_cast<std::size_t>(count * width)]);
        } else {
            floats.reset(new float[static_cast<std::size_t>(count * width)]);
        }
    }

    void set(const Kernels& kernels, std::ptrdiff_t i, const float* x) {
        if (packed) {
            kernels.quantize(x, columns, spans.get() + i * width);
        } else {
            std::copy_n(x, columns, floats.get() + i * width);
        }
    }

    bool packed;
    std::ptrdiff_t columns, width;
    std::unique_ptr<float[]> floats;
    std::unique_ptr<Span[]> spans;
};

// h[p - begin][r - first] = rows first..last of the group's expert times the activations of its pairs, plus
// bias. `of` says which entry of `x` a pair reads.
template <class Of>
void multiply(const Kernels& kernels, const ExpertMatrix& matrix, std::ptrdiff_t place, std::ptrdiff_t begin,
              std::ptrdiff_t end, std::ptrdiff_t first, std::ptrdiff_t last, const Inputs& x, Of of, float* h,
              std::ptrdiff_t h_stride) {
    const std::ptrdiff_t count = end - begin;
    if (matrix.packed) {
        Quantized rows[kPairsAtOnce];
        for (std::ptrdiff_t i = 0; i < count; ++i) rows[i] = x.spans.get() + of(begin + i) * x.width;
        Mxfp4Rows weight = matrix.mxfp4;
        weight.blocks += place * matrix.expert_block_stride;
        weight.scales += place * matrix.expert_scale_stride;
        kernels.mxfp4_rows(weight, first, last, rows, count, h, h_stride);
    } else {
        const float* rows[kPairsAtOnce];
        for (std::ptrdiff_t i = 0; i < count; ++i) rows[i] = x.floats.get() + of(begin + i) * x.width;
        DenseRows weight = matrix.dense;
        weight.data += place * matrix.expert_stride;
        kernels.dense_transposed(weight, first, last, rows, count, h, h_stride);
    }
    Values bias = matrix.bias;
    bias.data += bytes_of(bias.dtype) * place * matrix.rows;
    for (std::ptrdiff_t i = 0; i < count; ++i) add_values(bias, first, last, h + i * h_stride);
}

}  // namespace

void Engine::experts(const float* x, const Choice& choice, const ExpertLayer& layer, float* y) const {
    const std::vector<Pair> pairs = sorted_pairs(choice);
    if (pairs.empty()) return;
    const std::ptrdiff_t stored = std::min(layer.gate_up.experts, layer.down.experts);
    if (pairs.front().place < 0 || pairs.back().place >= stored) {
        throw std::invalid_argument("an id of an expert is not below " + std::to_string(stored));
    }
    const std::vector<Group> groups = groups_in(pairs);
    const ExpertMatrix &up = layer.gate_up, &down = layer.down;
    const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(pairs.size()), experts = static_cast<std::ptrdiff_t>(groups.size());
    const std::ptrdiff_t hidden = down.rows, units = up.rows / 2;
    const std::ptrdiff_t columns = up.packed ? up.mxfp4.columns : up.dense.columns;
    const std::ptrdiff_t up_rows = up.packed ? kUpRows : kTransposedRows;
    const std::ptrdiff_t down_rows = down.packed ? kDownRows : kTransposedRows;

    Inputs inputs(up.packed, choice.tokens, columns), between(down.packed, count, units);
    std::unique_ptr<float[]> z(new float[static_cast<std::size_t>(count * units)]);
    std::unique_ptr<float[]> parts(new float[static_cast<std::size_t>(count * hidden)]);
    const std::ptrdiff_t room = kPairsAtOnce * std::max(up_rows, down_rows);
    std::unique_ptr<float[]> rooms(new float[static_cast<std::size_t>(room * threads_)]);
    const std::ptrdiff_t up_pieces = (up.rows + up_rows - 1) / up_rows;
    const std::ptrdiff_t down_pieces = (hidden + down_rows - 1) / down_rows;

    const auto prepare = [&](std::ptrdiff_t t, int) { inputs.set(kernels_, t, x + t * columns); };
    const auto raise = [&](std::ptrdiff_t piece, int thread) {
        const Group& group = groups[static_cast<std::size_t>(piece / up_pieces)];
        const std::ptrdiff_t first = piece % up_pieces * up_rows, last = std::min(up.rows, first + up_rows);
        float* h = rooms.get() + room * thread;
        const auto token = [&](std::ptrdiff_t i) { return pairs[static_cast<std::size_t>(i)].token; };
        for (std::ptrdiff_t p = group.begin; p < group.end; p += kPairsAtOnce) {
            const std::ptrdiff_t end = std::min(group.end, p + kPairsAtOnce);
            multiply(kernels_, up, group.place, p, end, first, last, inputs, token, h, up_rows);
            for (std::ptrdiff_t i = p; i < end; ++i) {
                kernels_.swiglu(h + (i - p) * up_rows, (last - first) / 2, layer.limit, layer.alpha,
                                z.get() + i * units + first / 2);
            }
        }
    };
    // A block of 32 may have come from two pieces, so they are rounded when all are there.
    const auto round = [&](std::ptrdiff_t i, int) { between.set(kernels_, i, z.get() + i * units); };
    const auto lower = [&](std::ptrdiff_t piece, int thread) {
        const Group& group = groups[static_cast<std::size_t>(piece / down_pieces)];
        const std::ptrdiff_t first = piece % down_pieces * down_rows, last = std::min(hidden, first + down_rows);
        float* h = rooms.get() + room * thread;
        const auto itself = [](std::ptrdiff_t i) { return i; };
        for (std::ptrdiff_t p = group.begin; p < group.end; p += kPairsAtOnce) {
            const std::ptrdiff_t end = std::min(group.end, p + kPairsAtOnce);
            multiply(kernels_, down, group.place, p, end, first, last, between, itself, h, down_rows);
            for (std::ptrdiff_t i = p; i < end; ++i) {
                const Pair& pair = pairs[static_cast<std::size_t>(i)];
                const std::ptrdiff_t where = pair.token * choice.top_k + pair.slot;
                const float* from = h + (i - p) * down_rows;
                float* part = parts.get() + where * hidden;
                for (std::ptrdiff_t r = first; r < last; ++r) part[r] = choice.weights[where] * from[r - first];
            }
        }
    };
    const auto join = [&](std::ptrdiff_t t, int) {
        const float* part = parts.get() + t * choice.top_k * hidden;
        std::copy_n(part, hidden, y + t * hidden);
        for (std::ptrdiff_t s = 1; s < choice.top_k; ++s) {
            part += hidden;
            for (std::ptrdiff_t r = 0; r < hidden; ++r) y[t * hidden + r] += part[r];
        }
    };
    Pool::shared().run(threads_, {{choice.tokens, prepare},
                                  {experts * up_pieces, raise},
                                  {count, round},
                                  {experts * down_pieces, lower},
                                  {choice.tokens, join}});
}

}  // namespace moe_surgery::cpu
