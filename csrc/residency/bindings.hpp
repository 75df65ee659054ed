#pragma once

#include <nanobind/nanobind.h>

namespace moe_surgery::residency {

void bind(nanobind::module_& module);

}  // namespace moe_surgery::residency
