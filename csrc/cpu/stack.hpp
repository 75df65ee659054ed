// All decoder layers of a model as one operation: a step from the embedding to the last norm.
#pragma once

#include "engine.hpp"

namespace moe_surgery::cpu {

// A weight [rows, columns] and a bias [rows] or none.
struct Projection {
    DenseRows weight;
    std::ptrdiff_t rows;
    Values bias;
};

// One layer's weights, as addresses in mapped files.
struct DecoderLayer {
    Values attention_norm;
    Projection q, k, v, o;
    Values sinks;  // [heads]
    Values mlp_norm;
    Projection router;
    ExpertLayer experts;
    const std::int64_t* expert_map;  // stored index of each of the router's experts; null for the identity
    std::ptrdiff_t top_k;
    std::ptrdiff_t window;  // 0 for none
};

// One layer's part of the cache, float32: keys and values [batch, kv_heads, slots, head_dim] with strides in
// floats, inner axis contiguous. The step's tokens are stored in `slot_ids` before any of them attends.
struct LayerCache {
    float* keys;
    float* values;
    std::ptrdiff_t key_strides[3];
    std::ptrdiff_t value_strides[3];
    std::ptrdiff_t slots;             // that may be attended to
    const std::int64_t* positions;    // [batch, position_stride]: of the slots, -1 for none
    std::ptrdiff_t position_stride;
    const std::int64_t* slot_ids;       // [batch, seq_len], or [seq_len] where slot_id_stride is 0
    std::ptrdiff_t slot_id_stride;
};

struct Stack {
    std::vector<DecoderLayer> layers;
    std::ptrdiff_t hidden, heads, kv_heads, head_dim;
    float eps;
};

// The input of a step: x [batch, seq_len, hidden], updated in place, and the tokens' positions [batch, seq_len]
// with cos and sin [batch, seq_len, head_dim / 2].
struct Step {
    float* x;
    std::ptrdiff_t batch, seq_len;
    const std::int64_t* positions;
    const float* cos;
    const float* sin;
    std::vector<LayerCache> caches;
};

// Which experts a layer chooses, and what they read: h [tokens, hidden], ids (of the router) and weights
// [tokens, top_k].
struct Choice {
    float* h;
    std::int64_t* ids;
    float* weights;
};

// The choice of one layer for step.x; with `attend` after its attention, which is added to step.x, over the step's
// only cache.
void choose(const Engine& engine, const Stack& stack, std::size_t layer, bool attend, const Step& step, const Choice& choice);

// Throws std::invalid_argument as Engine::experts does.
void run(const Engine& engine, const Stack& stack, const Step& step);

}  // namespace moe_surgery::cpu
