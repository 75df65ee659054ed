// The binding of the CPU kernels.
#pragma once

#include <nanobind/nanobind.h>

namespace moe_surgery::cpu {

void bind(nanobind::module_& module);

}  // namespace moe_surgery::cpu
