// The kernels in plain C++, for any processor.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.inl"
#include "lanes_scalar.inl"

namespace moe_surgery::cpu {

const Kernels kScalarKernels = kernels_over<LanesScalar>("scalar");

}  // namespace moe_surgery::cpu
