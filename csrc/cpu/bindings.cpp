// Python binding of the CPU kernels. Tensors come as addresses, because a model makes hundreds of calls per token;
// moe_surgery.kernels.native, the only caller, has checked shapes, dtypes and strides.
#include "bindings.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "engine.hpp"
#include "stack.hpp"

namespace moe_surgery::cpu {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

using Address = std::uintptr_t;
using Length = std::ptrdiff_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// address or 0, number of the Dtype
using ValuesTuple = std::tuple<Address, int>;

Values values_of(const ValuesTuple& values) {
    return {at<const std::uint8_t>(std::get<0>(values)), static_cast<Dtype>(std::get<1>(values))};
}

// weight, row stride in bytes, rows, columns, bias, y
using ProductTuple = std::tuple<ValuesTuple, Length, Length, Length, ValuesTuple, Address>;

DenseRows rows_of(const ValuesTuple& weight, Length stride, Length columns) {
    const Values values = values_of(weight);
    return {values.data, stride, columns, values.dtype};
}

void products(const Engine& engine, Address x, Length tokens, const std::vector<ProductTuple>& tuples) {
    std::vector<Product> products;
    for (const auto& [weight, stride, rows, columns, bias, y] : tuples) {
        products.push_back({rows_of(weight, stride, columns), rows, values_of(bias), at<float>(y)});
    }
    nb::gil_scoped_release released;
    engine.products(at<const float>(x), tokens, products);
}

// The experts of a layer: see ExpertMatrix. Strides are bytes.
ExpertMatrix packed_matrix(Address blocks, Length expert_block_stride, Length block_stride, Address scales,
                           Length expert_scale_stride, Length scale_stride, Length experts, Length rows,
                           Length columns, const ValuesTuple& bias) {
    ExpertMatrix matrix = {};
    matrix.packed = true;
    matrix.mxfp4 = {at<const std::uint8_t>(blocks), block_stride, at<const std::uint8_t>(scales), scale_stride, columns};
    matrix.expert_block_stride = expert_block_stride;
    matrix.expert_scale_stride = expert_scale_stride;
    matrix.experts = experts;
    matrix.rows = rows;
    matrix.bias = values_of(bias);
    return matrix;
}

ExpertMatrix dense_matrix(const ValuesTuple& values, Length expert_stride, Length column_stride, Length experts,
                          Length rows, Length columns, const ValuesTuple& bias) {
    ExpertMatrix matrix = {};
    matrix.dense = rows_of(values, column_stride, columns);
    matrix.expert_stride = expert_stride;
    matrix.experts = experts;
    matrix.rows = rows;
    matrix.bias = values_of(bias);
    return matrix;
}

void experts(const Engine& engine, Address x, Address ids, Address weights, Length tokens, Length top_k,
             const ExpertMatrix& gate_up, const ExpertMatrix& down, float limit, float alpha, Address y) {
    const Routing routing = {at<const std::int64_t>(ids), at<const float>(weights), tokens, top_k};
    nb::gil_scoped_release released;
    engine.experts(at<const float>(x), routing, {gate_up, down, limit, alpha}, at<float>(y));
}

// `experts` with Measures: sums [groups, number of experts, hidden].
void measured_experts(const Engine& engine, Address x, Address ids, Address weights, Length tokens, Length top_k,
                      const ExpertMatrix& gate_up, const ExpertMatrix& down, float limit, float alpha, Address y,
                      Address groups, Address norms, Address least, Address largest, Address sums) {
    const Routing routing = {at<const std::int64_t>(ids), at<const float>(weights), tokens, top_k};
    const Measures measures = {at<const std::int64_t>(groups), down.experts, at<double>(norms), at<float>(least),
                               at<float>(largest), at<double>(sums)};
    nb::gil_scoped_release released;
    engine.experts(at<const float>(x), routing, {gate_up, down, limit, alpha}, at<float>(y), &measures);
}

void route(const Engine& engine, Address x, Length tokens, const ProductTuple& router, Length top_k, Address ids,
           Address weights) {
    const auto& [weight, stride, rows, columns, bias, logits] = router;
    nb::gil_scoped_release released;
    const Product product = {rows_of(weight, stride, columns), rows, values_of(bias), at<float>(logits)};
    engine.products(at<const float>(x), tokens, {product});
    topk_softmax(at<const float>(logits), tokens, rows, top_k, at<std::int64_t>(ids), at<float>(weights));
}

void rms_norm(const Engine& engine, Address x, Length tokens, Length columns, const ValuesTuple& weight, float eps, Address y) {
    nb::gil_scoped_release released;
    engine.rms_norm(at<const float>(x), tokens, columns, values_of(weight), eps, at<float>(y));
}

using Strides = std::tuple<Length, Length, Length>;
// batch, heads, kv_heads, queries, slots, head_dim, window
using Sizes = std::tuple<Length, Length, Length, Length, Length, Length, Length>;

void attention(const Engine& engine, Address q, Address keys, const Strides& key_strides, Address values,
            const Strides& value_strides, bool is_f32, Address sinks, Address query_positions, Address key_positions,
            const Sizes& sizes, Address out) {
    Attention a = {};
    a.q = at<const float>(q);
    a.keys = at<const std::uint8_t>(keys);
    a.values = at<const std::uint8_t>(values);
    std::tie(a.key_strides[0], a.key_strides[1], a.key_strides[2]) = key_strides;
    std::tie(a.value_strides[0], a.value_strides[1], a.value_strides[2]) = value_strides;
    a.is_f32 = is_f32;
    a.sinks = at<const float>(sinks);
    a.query_positions = at<const std::int64_t>(query_positions);
    a.key_positions = at<const std::int64_t>(key_positions);
    a.key_position_stride = std::get<4>(sizes);
    std::tie(a.batch, a.heads, a.kv_heads, a.queries, a.slots, a.head_dim, a.window) = sizes;
    a.out = at<float>(out);
    nb::gil_scoped_release released;
    engine.attention(a, visible_keys(a));
}

// weight, row stride in bytes, rows, columns, bias
using ProjectionTuple = std::tuple<ValuesTuple, Length, Length, Length, ValuesTuple>;

Projection projection_of(const ProjectionTuple& projection) {
    const auto& [weight, stride, rows, columns, bias] = projection;
    return {rows_of(weight, stride, columns), rows, values_of(bias)};
}

// q, k, v, o, router
using ProjectionTuples = std::tuple<ProjectionTuple, ProjectionTuple, ProjectionTuple, ProjectionTuple, ProjectionTuple>;

void add_layer(Stack& stack, const ValuesTuple& attention_norm, const ValuesTuple& mlp_norm,
               const ValuesTuple& sinks, const ProjectionTuples& projections,
               const ExpertMatrix& gate_up, const ExpertMatrix& down, float limit, float alpha, Address expert_map,
               Length top_k, Length window) {
    const auto& [q, k, v, o, router] = projections;
    stack.layers.push_back({values_of(attention_norm), projection_of(q), projection_of(k), projection_of(v),
                            projection_of(o), values_of(sinks), values_of(mlp_norm),
                            projection_of(router), {gate_up, down, limit, alpha}, at<const std::int64_t>(expert_map), top_k,
                            window});
}

// keys, strides, values, strides, slots, positions, stride, slot ids, stride
using LayerCacheTuple = std::tuple<Address, Strides, Address, Strides, Length, Address, Length, Address, Length>;

Step step_of(Address x, Length batch, Length seq_len, Address positions, Address cos, Address sin,
             const std::vector<LayerCacheTuple>& caches) {
    Step step = {at<float>(x), batch, seq_len, at<const std::int64_t>(positions), at<const float>(cos), at<const float>(sin), {}};
    for (const auto& [keys, key_strides, values, value_strides, slots, key_positions, key_position_stride, slot_ids, slot_id_stride] : caches) {
        LayerCache cache = {at<float>(keys), at<float>(values), {}, {}, slots, at<const std::int64_t>(key_positions), key_position_stride,
                            at<const std::int64_t>(slot_ids), slot_id_stride};
        std::tie(cache.key_strides[0], cache.key_strides[1], cache.key_strides[2]) = key_strides;
        std::tie(cache.value_strides[0], cache.value_strides[1], cache.value_strides[2]) = value_strides;
        step.caches.push_back(cache);
    }
    return step;
}

void run_stack(const Engine& engine, const Stack& stack, Address x, Length batch, Length seq_len, Address positions,
               Address cos, Address sin, const std::vector<LayerCacheTuple>& caches) {
    const Step step = step_of(x, batch, seq_len, positions, cos, sin, caches);
    if (step.caches.size() != stack.layers.size()) throw std::invalid_argument("each layer needs a cache");
    nb::gil_scoped_release released;
    run(engine, stack, step);
}

// Attends where there is a cache. h, ids, weights
void choose_experts(const Engine& engine, const Stack& stack, Length layer, Address x, Length batch, Length seq_len,
                    Address positions, Address cos, Address sin, const std::vector<LayerCacheTuple>& caches,
                    const std::tuple<Address, Address, Address>& choice) {
    const Step step = step_of(x, batch, seq_len, positions, cos, sin, caches);
    const auto& [h, ids, weights] = choice;
    nb::gil_scoped_release released;
    choose(engine, stack, static_cast<std::size_t>(layer), !step.caches.empty(), step,
           {at<float>(h), at<std::int64_t>(ids), at<float>(weights)});
}

void rope_cos_sin_at(Address positions, Length count, Address frequencies, Length width, float scale, Address cos,
              Address sin) {
    nb::gil_scoped_release released;
    rope_cos_sin(at<const std::int64_t>(positions), count, at<const float>(frequencies), width, scale, at<float>(cos),
          at<float>(sin));
}

// Strides count floats; the result is contiguous. Missing axes come first.
void apply_rope(Address x, const std::vector<Length>& x_strides, Address cos, const std::vector<Length>& cos_strides,
            Address sin, const std::vector<Length>& sin_strides, const std::vector<Length>& shape, Address y) {
    RopeArgs r = {at<const float>(x), at<const float>(cos), at<const float>(sin), {1, 1, 1}, {}, {}, {}, shape.back(), at<float>(y)};
    const std::size_t axes = shape.size() - 1;
    for (std::size_t i = 0; i < axes; ++i) {
        const std::size_t axis = 3 - axes + i;
        r.sizes[axis] = shape[i];
        r.x_strides[axis] = x_strides[i];
        r.cos_strides[axis] = cos_strides[i];
        r.sin_strides[axis] = sin_strides[i];
    }
    nb::gil_scoped_release released;
    apply_rope(r);
}

std::uint64_t read(Address from, Length bytes, int threads) {
    nb::gil_scoped_release released;
    return read_bytes(at<const std::uint8_t>(from), bytes, threads);
}

std::vector<std::string> names() {
    std::vector<std::string> result;
    for (const Kernels* kernels : available_kernels()) result.emplace_back(kernels->name);
    return result;
}

}  // namespace

void bind(nb::module_& module) {
    module.def("cpu_instruction_sets", &names, "Instruction sets that `Engine` supports on this machine, best first.");
    module.attr("TILED_TOKENS") = kTiledTokens;
    module.def("read_bytes", &read, "address"_a, "bytes"_a, "threads"_a);
    module.def("rope_cos_sin", &rope_cos_sin_at);
    module.def("apply_rope", nb::overload_cast<Address, const std::vector<Length>&, Address, const std::vector<Length>&, Address, const std::vector<Length>&, const std::vector<Length>&, Address>(&apply_rope));
    nb::class_<ExpertMatrix>(module, "ExpertMatrix");
    module.def("packed_matrix", &packed_matrix);
    module.def("dense_matrix", &dense_matrix);
    nb::class_<Stack>(module, "Stack")
        .def("__init__",
             [](Stack* self, Length hidden, Length heads, Length kv_heads, Length head_dim, float eps) {
                 new (self) Stack{{}, hidden, heads, kv_heads, head_dim, eps};
             },
             "hidden"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "eps"_a)
        .def("add_layer", &add_layer);
    nb::class_<Engine>(module, "Engine")
        .def("__init__",
             [](Engine* self, const std::string& isa, int threads, bool long_step) {
                 if (threads < 1) throw std::invalid_argument("threads must be at least 1");
                 new (self) Engine(select_kernels(isa), threads, long_step);
             },
             "isa"_a, "threads"_a, "long_step"_a = false)
        .def_prop_ro("isa", [](const Engine& engine) { return engine.kernels().name; })
        .def_prop_ro("threads", &Engine::threads)
        .def_prop_ro("tiled", &Engine::tiled, "Whether products are tiled: asked for, and available.")
        .def("products", &products)
        .def("route", &route)
        .def("experts", &experts)
        .def("measured_experts", &measured_experts)
        .def("rms_norm", &rms_norm)
        .def("attention", &attention)
        .def("run", &run_stack)
        .def("choose", &choose_experts);
}

}  // namespace moe_surgery::cpu
