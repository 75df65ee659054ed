#include "choices.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace moe_surgery::cpu {
namespace {

std::vector<Pair> sorted_pairs(const Routing& routing) {
    std::vector<Pair> pairs;
    pairs.reserve(static_cast<std::size_t>(routing.tokens * routing.top_k));
    for (std::ptrdiff_t t = 0; t < routing.tokens; ++t) {
        for (std::ptrdiff_t s = 0; s < routing.top_k; ++s) {
            pairs.push_back({static_cast<std::ptrdiff_t>(routing.ids[t * routing.top_k + s]), t, s});
        }
    }
    std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.stored_expert < b.stored_expert; });
    return pairs;
}

// Columns of an expert's outputs that are summed as a piece.
constexpr std::ptrdiff_t kSummedColumns = 512;

std::vector<Group> groups_in(const std::vector<Pair>& pairs) {
    std::vector<Group> groups;
    for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(pairs.size()); ++i) {
        const std::ptrdiff_t stored_expert = pairs[static_cast<std::size_t>(i)].stored_expert;
        if (groups.empty() || groups.back().stored_expert != stored_expert) groups.push_back({stored_expert, i, i});
        groups.back().end = i + 1;
    }
    return groups;
}

}  // namespace

Choices choices_of(const Routing& routing, std::ptrdiff_t stored_experts) {
    std::vector<Pair> pairs = sorted_pairs(routing);
    if (!pairs.empty() && (pairs.front().stored_expert < 0 || pairs.back().stored_expert >= stored_experts)) {
        throw std::invalid_argument("an id of an expert is not below " + std::to_string(stored_experts));
    }
    std::vector<Group> groups = groups_in(pairs);
    return {routing, std::move(pairs), std::move(groups)};
}

SlotOutputs::SlotOutputs(const Kernels& kernels, const Choices& choices, std::ptrdiff_t hidden, float* y, const Measures* measures)
    : kernels_(kernels), choices_(choices), top_k_(choices.routing.top_k), hidden_(hidden), y_(y), measures_(measures), outputs_(y) {
    if (top_k_ == 1 && !measures) return;
    owned_.resize(choices.routing.tokens * top_k_ * hidden);
    outputs_ = owned_.get();
}

void SlotOutputs::append_phases(std::vector<Phase>& phases) const {
    const std::ptrdiff_t tokens = choices_.routing.tokens;
    if (measures_) {
        const std::ptrdiff_t parts = (hidden_ + kSummedColumns - 1) / kSummedColumns;
        phases.push_back({tokens, [this](std::ptrdiff_t token, int) { measure(token); }});
        phases.push_back({static_cast<std::ptrdiff_t>(choices_.groups.size()) * parts, [this, parts](std::ptrdiff_t piece, int) {
            const std::ptrdiff_t first = piece % parts * kSummedColumns;
            add_to_sums(choices_.groups[static_cast<std::size_t>(piece / parts)], first, std::min(hidden_, first + kSummedColumns));
        }});
    } else if (top_k_ > 1) {
        phases.push_back({tokens, [this](std::ptrdiff_t token, int) { sum(token); }});
    }
}

void SlotOutputs::sum(std::ptrdiff_t token) const {
    const float* output = outputs_ + token * top_k_ * hidden_;
    for (std::ptrdiff_t s = 0; s < top_k_; ++s, output += hidden_) {
        kernels_.add_weighted(output, hidden_, 1.0f, s == 0, y_ + token * hidden_);
    }
}

void SlotOutputs::measure(std::ptrdiff_t token) const {
    const float* output = outputs_ + token * top_k_ * hidden_;
    for (std::ptrdiff_t i = token * top_k_; i < (token + 1) * top_k_; ++i, output += hidden_) {
        measures_->norms[i] = kernels_.measure(output, hidden_, measures_->least + i, measures_->largest + i);
        kernels_.add_weighted(output, hidden_, choices_.routing.weights[i], i == token * top_k_, y_ + token * hidden_);
    }
}

// Columns first .. last of the outputs of one expert, in order of the tokens.
void SlotOutputs::add_to_sums(const Group& group, std::ptrdiff_t first, std::ptrdiff_t last) const {
    for (std::ptrdiff_t p = group.begin; p < group.end; ++p) {
        const Pair& pair = choices_.pairs[static_cast<std::size_t>(p)];
        const std::ptrdiff_t row = measures_->groups[pair.token] * measures_->experts + group.stored_expert;
        kernels_.add_to_doubles(of(pair) + first, last - first, measures_->sums + row * hidden_ + first);
    }
}

}  // namespace moe_surgery::cpu
