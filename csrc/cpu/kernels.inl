// Every kernel, over the sixteen lanes V of one instruction set. Included once by each set's file.
#include "activations.inl"
#include "attention.inl"
#include "attention_tile.inl"
#include "dense.inl"
#include "dense_transposed.inl"
#include "elementwise.inl"
#include "measures.inl"
#include "mxfp4_rows.inl"
#include "q8_0_rows.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
constexpr Kernels kernels_over(const char* name) {
    return {name,
            Activations<V>::deinterleave,
            Activations<V>::quantize,
            Activations<V>::quantize_words,
            Dense<V>::dense_rows,
            Mxfp4<V>::mxfp4_rows,
            Q8_0<V>::q8_0_rows,
            DenseTransposed<V>::dense_transposed,
            Elementwise<V>::swiglu,
            Elementwise<V>::rms_norm,
            MeasureKernels::measure,
            MeasureKernels::add_weighted,
            MeasureKernels::add_to_doubles,
            AttentionKernel<V>::attention,
            AttentionTile<V>::transpose_keys,
            AttentionTile<V>::attention_tile,
            nullptr};
}

}  // namespace
}  // namespace moe_surgery::cpu
