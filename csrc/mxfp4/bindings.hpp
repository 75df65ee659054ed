// The binding of the MXFP4 conversions.
#pragma once

#include <nanobind/nanobind.h>

namespace moe_surgery::mxfp4 {

void bind(nanobind::module_& module);

}  // namespace moe_surgery::mxfp4
