// For any processor: what its compiler may use by default.
#include "encode.inl"

namespace moe_surgery::q8_0 {

const Kernels kScalarKernels = {"scalar", encode<Bf16>, encode<F32>};

}  // namespace moe_surgery::q8_0
