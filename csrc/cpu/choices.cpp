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

SlotOutputs::SlotOutputs(const Routing& routing, std::ptrdiff_t hidden, float* y)
    : top_k_(routing.top_k), hidden_(hidden), y_(y), outputs_(y) {
    if (top_k_ == 1) return;
    owned_.reset(new float[static_cast<std::size_t>(routing.tokens * top_k_ * hidden)]);
    outputs_ = owned_.get();
}

void SlotOutputs::sum(std::ptrdiff_t token) const {
    if (top_k_ == 1) return;
    const float* output = outputs_ + token * top_k_ * hidden_;
    float* y = y_ + token * hidden_;
    std::copy_n(output, hidden_, y);
    for (std::ptrdiff_t s = 1; s < top_k_; ++s) {
        output += hidden_;
        for (std::ptrdiff_t r = 0; r < hidden_; ++r) y[r] += output[r];
    }
}

}  // namespace moe_surgery::cpu
