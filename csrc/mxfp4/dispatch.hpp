// Which implementations run on this machine, and choosing one.
#pragma once

#include <string>
#include <vector>

#include "mxfp4.hpp"

namespace moe_surgery::mxfp4 {

// The implementations that this processor and operating system can run, best first.
const std::vector<const Kernels*>& available_kernels();

// The implementation called `name`, or the best one for an empty name.
// Throws std::invalid_argument, listing the available names, when it is not one of them.
const Kernels& select_kernels(const std::string& name);

}  // namespace moe_surgery::mxfp4
