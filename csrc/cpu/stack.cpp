#include "stack.hpp"

#include <algorithm>
#include <map>
#include <utility>

#include "bits.hpp"
#include "scratch.hpp"

namespace moe_surgery::cpu {
namespace {

using Floats = Scratch<float>;

Product product_of(const Projection& projection, float* y) {
    return {projection.weight, projection.rows, projection.bias, y};
}

void add(const Floats& terms, float* x) {
    for (std::ptrdiff_t i = 0; i < terms.size(); ++i) x[i] += terms[i];
}

// One step through all layers, with the buffers between operations.
class Run {
  public:
    Run(const Engine& engine, const Stack& stack, const Step& step)
        : engine_(engine), stack_(stack), step_(step), tokens_(step.batch * step.seq_len) {
        const std::ptrdiff_t queries = stack.heads * stack.head_dim, keys = stack.kv_heads * stack.head_dim;
        h_.resize(tokens_ * stack.hidden);
        y_.resize(h_.size());
        q_.resize(tokens_ * queries);
        rotated_.resize(q_.size());
        k_.resize(tokens_ * keys);
        v_.resize(k_.size());
        sinks_.resize(stack.heads);
    }

    void self_attention(const DecoderLayer& layer, const LayerCache& cache) {
        norm(layer.attention_norm);
        engine_.products(h_.get(), tokens_, {product_of(layer.q, q_.get()), product_of(layer.k, k_.get()),
                                              product_of(layer.v, v_.get())});
        rotate_queries();
        store(cache);
        attention_over_cache(layer, cache);
        engine_.products(q_.get(), tokens_, {product_of(layer.o, y_.get())});
        add(y_, step_.x);
    }

    void moe(const DecoderLayer& layer) {
        norm(layer.mlp_norm);
        logits_.resize(tokens_ * layer.router.rows);
        ids_.resize(static_cast<std::size_t>(tokens_ * layer.top_k));
        weights_.resize(tokens_ * layer.top_k);
        engine_.products(h_.get(), tokens_, {product_of(layer.router, logits_.get())});
        topk_softmax(logits_.get(), tokens_, layer.router.rows, layer.top_k, ids_.data(), weights_.get());
        if (layer.expert_map) {
            for (std::int64_t& id : ids_) id = layer.expert_map[id];
        }
        engine_.experts(h_.get(), {ids_.data(), weights_.get(), tokens_, layer.top_k}, layer.experts, y_.get());
        add(y_, step_.x);
    }

    void choose(const DecoderLayer& layer, const Choice& choice) {
        norm(layer.mlp_norm);
        std::copy_n(h_.get(), h_.size(), choice.h);
        logits_.resize(tokens_ * layer.router.rows);
        engine_.products(h_.get(), tokens_, {product_of(layer.router, logits_.get())});
        topk_softmax(logits_.get(), tokens_, layer.router.rows, layer.top_k, choice.ids, choice.weights);
    }

  private:
    void norm(const Values& weight) {
        engine_.rms_norm(step_.x, tokens_, stack_.hidden, weight, stack_.eps, h_.get());
    }

    // [batch, seq_len, heads, head_dim] to [batch, heads, seq_len, head_dim].
    void rotate_queries() {
        const std::ptrdiff_t d = stack_.head_dim, width = stack_.heads * d, half = d / 2;
        const std::ptrdiff_t angles[3] = {step_.seq_len * half, 0, half};
        apply_rope({q_.get(), step_.cos, step_.sin,
                {step_.batch, stack_.heads, step_.seq_len},
                {step_.seq_len * width, d, width},
                {angles[0], angles[1], angles[2]},
                {angles[0], angles[1], angles[2]},
                d, rotated_.get()});
    }

    void store(const LayerCache& cache) {
        const std::ptrdiff_t d = stack_.head_dim;
        for (std::ptrdiff_t t = 0; t < tokens_; ++t) {
            const std::ptrdiff_t b = t / step_.seq_len, i = t % step_.seq_len;
            const std::ptrdiff_t slot = cache.slot_ids[b * cache.slot_id_stride + i];
            for (std::ptrdiff_t head = 0; head < stack_.kv_heads; ++head) {
                const std::ptrdiff_t from = (t * stack_.kv_heads + head) * d;
                apply_rope({k_.get() + from, step_.cos + t * d / 2, step_.sin + t * d / 2, {1, 1, 1}, {}, {}, {}, d,
                        cache.keys + b * cache.key_strides[0] + head * cache.key_strides[1] + slot * cache.key_strides[2]});
                std::copy_n(v_.get() + from, d,
                            cache.values + b * cache.value_strides[0] + head * cache.value_strides[1] +
                                slot * cache.value_strides[2]);
            }
        }
    }

    // To q_ [batch, seq_len, heads * head_dim].
    void attention_over_cache(const DecoderLayer& layer, const LayerCache& cache) {
        Attention a = {};
        a.q = rotated_.get();
        a.keys = reinterpret_cast<const std::uint8_t*>(cache.keys);
        a.values = reinterpret_cast<const std::uint8_t*>(cache.values);
        for (int i = 0; i < 3; ++i) {
            a.key_strides[i] = cache.key_strides[i] * static_cast<std::ptrdiff_t>(sizeof(float));
            a.value_strides[i] = cache.value_strides[i] * static_cast<std::ptrdiff_t>(sizeof(float));
        }
        a.is_f32 = true;
        for (std::ptrdiff_t i = 0; i < stack_.heads; ++i) sinks_[i] = value_at(layer.sinks, i);
        a.sinks = sinks_.get();
        a.query_positions = step_.positions;
        a.key_positions = cache.positions;
        a.key_position_stride = cache.position_stride;
        a.batch = step_.batch;
        a.heads = stack_.heads;
        a.kv_heads = stack_.kv_heads;
        a.queries = step_.seq_len;
        a.slots = cache.slots;
        a.head_dim = stack_.head_dim;
        a.window = layer.window;
        a.out = q_.get();
        // Layers with the same cache positions and window share visible keys.
        const auto key = std::make_pair(cache.positions, layer.window);
        const auto found = visible_.find(key);
        engine_.attention(a, found != visible_.end() ? found->second : visible_.emplace(key, visible_keys(a)).first->second);
    }

    const Engine& engine_;
    const Stack& stack_;
    const Step& step_;
    const std::ptrdiff_t tokens_;
    Floats h_, y_, q_, rotated_, k_, v_, sinks_, logits_, weights_;
    std::vector<std::int64_t> ids_;
    std::map<std::pair<const std::int64_t*, std::ptrdiff_t>, VisibleKeys> visible_;
};

// The engine for a step: long ones are multiplied in tiles.
Engine for_step(const Engine& engine, const Step& step) {
    return Engine(engine.kernels(), engine.threads(), step.seq_len >= kTiledTokens);
}

}  // namespace

void choose(const Engine& engine, const Stack& stack, std::size_t layer, bool attend, const Step& step, const Choice& choice) {
    const Engine chosen = for_step(engine, step);
    Run run(chosen, stack, step);
    if (attend) run.self_attention(stack.layers.at(layer), step.caches.at(0));
    run.choose(stack.layers.at(layer), choice);
}

void run(const Engine& engine, const Stack& stack, const Step& step) {
    const Engine chosen = for_step(engine, step);
    Run run(chosen, stack, step);
    for (std::size_t i = 0; i < stack.layers.size(); ++i) {
        run.self_attention(stack.layers[i], step.caches[i]);
        run.moe(stack.layers[i]);
    }
}

}  // namespace moe_surgery::cpu
