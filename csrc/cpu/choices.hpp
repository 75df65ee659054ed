// Which tokens chose which expert.
#pragma once

#include <cstddef>
#include <vector>

#include "engine.hpp"
#include "pool.hpp"
#include "scratch.hpp"

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

// Outputs of each token's slots, [tokens, top_k, hidden], times `factor`: what is left to do with them are `phases`,
// their weighted sum in order of the slots and their measures, if any.
class SlotOutputs {
  public:
    SlotOutputs(const Kernels& kernels, const Choices& choices, std::ptrdiff_t hidden, float* y, const Measures* measures);

    float* of(const Pair& pair) const { return outputs_ + (pair.token * top_k_ + pair.slot) * hidden_; }
    // The weight, or 1 where outputs are measured before it.
    float factor(const Pair& pair) const {
        return measures_ ? 1.0f : choices_.routing.weights[pair.token * top_k_ + pair.slot];
    }
    void append_phases(std::vector<Phase>& phases) const;

  private:
    void sum(std::ptrdiff_t token) const;
    void measure(std::ptrdiff_t token) const;
    void add_to_sums(const Group& group, std::ptrdiff_t first, std::ptrdiff_t last) const;

    const Kernels& kernels_;
    const Choices& choices_;
    const std::ptrdiff_t top_k_, hidden_;
    float* const y_;
    const Measures* const measures_;
    Scratch<float> owned_;
    float* outputs_;  // y where there is one slot and nothing is measured
};

}  // namespace moe_surgery::cpu
