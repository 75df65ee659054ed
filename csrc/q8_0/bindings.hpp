#pragma once

#include <nanobind/nanobind.h>

namespace moe_surgery::q8_0 {

void bind(nanobind::module_& module);

}  // namespace moe_surgery::q8_0
