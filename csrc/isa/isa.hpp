// Which instruction sets this processor and operating system can run, and choosing an implementation by name.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace moe_surgery::isa {

enum class Isa { scalar, neon, avx2, avx512, avx512vnni, avx512bf16, amx };

// Whether what is compiled for `isa` runs here: avx2 means AVX2, FMA and F16C; avx512 the subsets F, BW, VL and
// DQ; avx512vnni these and VNNI; avx512bf16 all these and BF16; amx all these, AMX's tiles and their products of BF16 and
// of integers.
// Linux lets a process use tiles on request: the first question about amx is that request, and where it is
// refused amx does not run here.
bool supported(Isa isa);

// The implementation called `name`, or the first (the best) for an empty name. Throws std::invalid_argument,
// listing the available names, when it is not one of them.
template <class Kernels>
const Kernels& select(const std::vector<const Kernels*>& available, const std::string& name) {
    if (name.empty()) return *available.front();
    std::string names;
    for (const Kernels* candidate : available) {
        if (name == candidate->name) return *candidate;
        names += names.empty() ? candidate->name : std::string(", ") + candidate->name;
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available here; available: " + names);
}

}  // namespace moe_surgery::isa
