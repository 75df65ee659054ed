// All decoder layers of a model as one operation: what a step does between embedding and last norm.
#pragma once

#include "engine.hpp"

namespace moe_surgery::cpu {

// A weight [rows, columns] and a bias [rows] or none.
struct Projection {
    DenseRows weight;
    std::ptrdiff_t rows;
    Values bias;
};

// One layer's weights, wherever they are mapped.
struct DecoderLayer {
    Values attention_norm;
    Projection q, k, v, o;
    Values sinks;  // [heads]
    Values mlp_norm;
    Projection router;
    ExpertLayer experts;
    const std::int64_t* index;  // the stored place of each of the router's experts, or null: its own
    std::ptrdiff_t top_k;
    std::ptrdiff_t window;  // 0 for none
};

// One layer's part of the cache, float32: keys and values [batch, kv_heads, slots, head_dim] with strides in
// floats, inner axis contiguous. Columns of the step are stored at `places` before any of them attends.
struct LayerCache {
    float* keys;
    float* values;
    std::ptrdiff_t key_strides[3];
    std::ptrdiff_t value_strides[3];
    std::ptrdiff_t slots;             // that may be seen
    const std::int64_t* positions;    // [batch, position_stride]: of the slots, -1 where there is none
    std::ptrdiff_t position_stride;
    const std::int64_t* places;       // [batch, columns], or [columns] where place_stride is 0
    std::ptrdiff_t place_stride;
};

struct Stack {
    std::vector<DecoderLayer> layers;
    std::ptrdiff_t hidden, heads, kv_heads, head_dim;
    float eps;
};

// What a step is about: x [batch, columns, hidden], changed in place, and the tokens' positions
// [batch, columns] with cos and sin [batch, columns, head_dim / 2].
struct Step {
    float* x;
    std::ptrdiff_t batch, columns;
    const std::int64_t* positions;
    const float* cos;
    const float* sin;
    std::vector<LayerCache> caches;
};

// Throws std::invalid_argument as Engine::experts does.
void run(const Engine& engine, const Stack& stack, const Step& step);

}  // namespace moe_surgery::cpu
