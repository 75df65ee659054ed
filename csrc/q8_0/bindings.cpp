// Python bindings of the conversion to Q8_0: check sizes, release the GIL.
#include "bindings.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../isa/isa.hpp"
#include "q8_0.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace moe_surgery::q8_0 {
namespace {

using Bf16In = nb::ndarray<const std::uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using F32In = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Encode = std::ptrdiff_t (*)(const std::uint8_t*, std::ptrdiff_t, std::uint8_t*);

// The implementations that this processor and operating system can run, best first.
const std::vector<const Kernels*>& available_kernels() {
    static const std::vector<const Kernels*> kernels = [] {
        std::vector<const Kernels*> found;
#if defined(__x86_64__)
        if (isa::supported(isa::Isa::avx2)) found.push_back(&kAvx2Kernels);
#endif
        found.push_back(&kScalarKernels);
        return found;
    }();
    return kernels;
}

template <class In>
std::ptrdiff_t run(Encode Kernels::* encode, const In& values, const BytesOut& out, const std::string& isa) {
    const auto count = static_cast<std::ptrdiff_t>(values.shape(0));
    const std::ptrdiff_t blocks = count / kBlockValues;
    if (count % kBlockValues != 0 || static_cast<std::ptrdiff_t>(out.shape(0)) != blocks * kBlockBytes) {
        throw std::invalid_argument(std::to_string(count) + " values are not whole blocks for " +
                                    std::to_string(out.shape(0)) + " bytes");
    }
    const Kernels& kernels = isa::select(available_kernels(), isa);
    nb::gil_scoped_release released;
    return (kernels.*encode)(reinterpret_cast<const std::uint8_t*>(values.data()), blocks, out.data());
}

std::ptrdiff_t encode_bf16(const Bf16In& values, const BytesOut& out, const std::string& isa) {
    return run(&Kernels::encode_bf16, values, out, isa);
}

std::ptrdiff_t encode_f32(const F32In& values, const BytesOut& out, const std::string& isa) {
    return run(&Kernels::encode_f32, values, out, isa);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
    return names;
}

}  // namespace

void bind(nb::module_& module) {
    module.def("q8_0_instruction_sets", &instruction_sets, "Names that `isa` of encode_q8_0 may have, best first.");
    module.def("encode_q8_0", &encode_bf16, "values"_a.noconvert(), "out"_a.noconvert(), "isa"_a = "");
    module.def("encode_q8_0", &encode_f32, "values"_a.noconvert(), "out"_a.noconvert(), "isa"_a = "");
}

}  // namespace moe_surgery::q8_0
