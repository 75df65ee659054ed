// The operations of a model, over one instruction set and a number of threads.
//
// Tokens' activations are float32, contiguous rows; products with MXFP4 and Q8_0 weights round them to 16-bit integers.
// Results do not depend on the number of threads or on which tokens are computed together. They do depend on
// whether a step is long: its attention is computed in tiles, and its products, where the instruction set has tiles
// for them (see tiles.hpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "tiles.hpp"

namespace moe_surgery::cpu {

// The instruction sets that this processor can run, best first.
const std::vector<const Kernels*>& available_kernels();

// The set called `name`, or the best for an empty name. Throws std::invalid_argument listing the names.
const Kernels& select_kernels(const std::string& name);

// y [tokens, rows] = x [tokens, columns] times a weight [rows, columns], plus bias [rows] if any.
struct Product {
    DenseRows weight;
    std::ptrdiff_t rows;
    Values bias;
    float* y;
};

// A weight per expert, MXFP4 rows or dense and transposed; `expert_stride` bytes from one expert to the next.
struct ExpertMatrix {
    bool packed;
    Mxfp4Rows mxfp4;
    std::ptrdiff_t expert_block_stride;
    std::ptrdiff_t expert_scale_stride;
    DenseRows dense;  // of a column: `columns` of them, `rows` values each
    std::ptrdiff_t expert_stride;
    std::ptrdiff_t experts;
    std::ptrdiff_t rows;
    Values bias;  // [experts, rows]
};

struct ExpertLayer {
    ExpertMatrix gate_up;
    ExpertMatrix down;
    float limit;
    float alpha;
};

// The chosen experts: ids [tokens, top_k] are indices in the stored tensors.
struct Routing {
    const std::int64_t* ids;
    const float* weights;
    std::ptrdiff_t tokens;
    std::ptrdiff_t top_k;
};

// What a call of the experts measures of their outputs before they are weighted. Of each token's slots
// [tokens, top_k]: the norm, and the least and the largest value. `sums` [groups, experts, hidden]: an output is
// added to that of its token's group and its stored expert; groups [tokens].
struct Measures {
    const std::int64_t* groups;
    std::ptrdiff_t experts;
    double* norms;
    float* least;
    float* largest;
    double* sums;
};

struct Choices;      // see choices.hpp
class SlotOutputs;

// Keys and values [batch, kv_heads, slots, head_dim], inner axis contiguous, strides in bytes.
struct Attention {
    const float* q;  // [batch, heads, queries, head_dim], contiguous
    const std::uint8_t* keys;
    const std::uint8_t* values;
    std::ptrdiff_t key_strides[3];
    std::ptrdiff_t value_strides[3];
    bool is_f32;
    const float* sinks;  // [heads]
    const std::int64_t* query_positions;  // [batch, queries]
    const std::int64_t* key_positions;    // [batch, slots of key_position_stride], -1 for none
    std::ptrdiff_t key_position_stride;
    std::ptrdiff_t batch, heads, kv_heads, queries, slots, head_dim;
    std::ptrdiff_t window;  // 0 for none
    float* out;             // [batch, queries, heads * head_dim]
};

// The slots that each query attends to: range [first, last) of `slots`, which has those of a sequence in order of
// position, one sequence after the other.
struct VisibleKeys {
    struct Range {
        std::ptrdiff_t first, last;
        std::ptrdiff_t count() const { return last - first; }
    };
    std::vector<std::int32_t> slots;
    std::vector<Range> queries;    // [batch, queries]
    std::vector<Range> sequences;  // [batch]
};
VisibleKeys visible_keys(const Attention& attention);

// The keys that are given, or all those of sequence b, of one key-value head.
KeyRange range_of(const Attention& attention, const VisibleKeys& visible, std::ptrdiff_t b, std::ptrdiff_t kv_head,
                  const VisibleKeys::Range& keys);
KeyRange range_of(const Attention& attention, const VisibleKeys& visible, std::ptrdiff_t b, std::ptrdiff_t kv_head);

// Tokens of each sequence in a step from which on its products are tiled.
constexpr std::ptrdiff_t kTiledTokens = 32;

class Engine {
  public:
    // `long_step`: attention is computed in tiles, and where the set has them, products of BF16 and Q8_0 weights
    // and of experts in MXFP4 or BF16.
    Engine(const Kernels& kernels, int threads, bool long_step = false)
        : kernels_(kernels), threads_(threads), long_step_(long_step), tiles_(long_step ? kernels.tiles : nullptr) {}

    // Several products with the same activations, as one.
    void products(const float* x, std::ptrdiff_t tokens, const std::vector<Product>& products) const;
    // y [tokens, hidden]: the sum over each token's chosen experts, in order of choice. Throws
    // std::invalid_argument for an id out of range.
    void experts(const float* x, const Routing& routing, const ExpertLayer& layer, float* y,
                 const Measures* measures = nullptr) const;
    void rms_norm(const float* x, std::ptrdiff_t tokens, std::ptrdiff_t columns, const Values& weight,
                  float eps, float* y) const;
    void attention(const Attention& attention, const VisibleKeys& visible) const;

    const Kernels& kernels() const { return kernels_; }
    int threads() const { return threads_; }
    bool tiled() const { return tiles_; }

  private:
    void row_products(const float* x, std::ptrdiff_t tokens, const std::vector<Product>& products) const;
    void tiled_products(const float* x, std::ptrdiff_t tokens, const std::vector<Product>& products) const;
    void row_experts(const float* x, const Choices& choices, const ExpertLayer& layer, const SlotOutputs& outputs) const;
    void tiled_experts(const float* x, const Choices& choices, const ExpertLayer& layer, const SlotOutputs& outputs) const;
    void long_attention(const Attention& attention, const VisibleKeys& visible) const;
    // False, with nothing done, where the set has no tiles for it or a sequence's positions have gaps.
    bool attention_in_tiles(const Attention& attention, const VisibleKeys& visible) const;
    void q8_0_products(const float* x, std::ptrdiff_t tokens, const std::vector<Product>& products) const;

    const Kernels& kernels_;
    const int threads_;
    const bool long_step_;
    const TileKernels* const tiles_;  // null for products by rows
};

// ids and weights [tokens, top_k] from logits [tokens, experts]: the largest, largest first, ties to the
// lowest index, and the softmax over those alone.
void topk_softmax(const float* logits, std::ptrdiff_t tokens, std::ptrdiff_t experts, std::ptrdiff_t top_k,
            std::int64_t* ids, float* weights);

// cos and sin of positions [count] times frequencies [width], times scale: [count, width] each.
void rope_cos_sin(const std::int64_t* positions, std::ptrdiff_t count, const float* frequencies, std::ptrdiff_t width,
           float scale, float* cos, float* sin);

// y [sizes, head_dim], contiguous: the halves (a, b) of each head become (a cos - b sin, b cos + a sin).
// Strides count floats; the last axes are contiguous.
struct RopeArgs {
    const float* x;
    const float* cos;
    const float* sin;
    std::ptrdiff_t sizes[3], x_strides[3], cos_strides[3], sin_strides[3];
    std::ptrdiff_t head_dim;
    float* y;
};
void apply_rope(const RopeArgs& args);

// The sum of the bytes as 64-bit words, read by `threads` threads: measures memory bandwidth.
std::uint64_t read_bytes(const std::uint8_t* from, std::ptrdiff_t bytes, int threads);

}  // namespace moe_surgery::cpu
