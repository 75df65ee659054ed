// Which tokens chose which expert.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "engine.hpp"

namespace moe_surgery::cpu {

struct Pair {
    std::ptrdiff_t stored_expert, token, slot;
};

// The (token, slot) pairs of one expert: pairs[begin .. end).
struct Group {
    std::ptrdiff_t stored_expert, begin, end;
};

struct Choices {
    const Routing& routing;
    std::vector<Pair> pairs;  // by expert, of each in order of the tokens
    std::vector<Group> groups;
};

// Throws std::invalid_argument for an id out of range.
Choices choices_of(const Routing& routing, std::ptrdiff_t stored_experts);

// Weighted outputs of each token's slots, [tokens, top_k, hidden], and their sum in order of the slots.
class SlotOutputs {
  public:
    // With one slot they are the sum, and are written to y at once.
    SlotOutputs(const Routing& routing, std::ptrdiff_t hidden, float* y);

    float* of(const Pair& pair) const { return outputs_ + (pair.token * top_k_ + pair.slot) * hidden_; }
    void sum(std::ptrdiff_t token) const;

  private:
    std::ptrdiff_t top_k_, hidden_;
    float* y_;
    std::unique_ptr<float[]> owned_;
    float* outputs_;
};

}  // namespace moe_surgery::cpu
