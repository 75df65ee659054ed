// Python bindings of the MXFP4 conversions: check shapes and contiguity, release the GIL, report errors.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "dispatch.hpp"
#include "mxfp4.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace moe_surgery::mxfp4 {
namespace {

using BytesIn3 = nb::ndarray<const std::uint8_t, nb::ndim<3>, nb::device::cpu>;
using BytesIn2 = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::device::cpu>;
using BytesOut3 = nb::ndarray<std::uint8_t, nb::ndim<3>, nb::device::cpu>;
using BytesOut2 = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::device::cpu>;
using WordsIn = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::device::cpu>;
using WordsOut = nb::ndarray<std::uint16_t, nb::ndim<2>, nb::device::cpu>;

template <class Array>
std::string shape_text(const Array& array) {
    std::string text = "[";
    for (std::size_t axis = 0; axis < array.ndim(); ++axis) {
        text += (axis ? ", " : "") + std::to_string(array.shape(axis));
    }
    return text + "]";
}

template <class Array>
std::ptrdiff_t extent(const Array& array, std::size_t axis) {
    return static_cast<std::ptrdiff_t>(array.shape(axis));
}

template <class Array>
std::ptrdiff_t row_bytes(const Array& array) {
    return static_cast<std::ptrdiff_t>(array.stride(0)) * static_cast<std::ptrdiff_t>(array.itemsize());
}

// Axis 0 may have any stride; an axis of one element has no stride that matters.
template <class Array>
void require_contiguous_rows(const char* name, const Array& array) {
    std::int64_t expected = 1;
    for (std::size_t axis = array.ndim() - 1; axis > 0; --axis) {
        if (array.shape(axis) > 1 && array.stride(axis) != expected) {
            throw std::invalid_argument(std::string(name) + " must be contiguous in all axes but the first");
        }
        expected *= static_cast<std::int64_t>(array.shape(axis));
    }
}

template <class Blocks, class Scales>
void require_packed(const Blocks& blocks, const Scales& scales) {
    require_contiguous_rows("blocks", blocks);
    require_contiguous_rows("scales", scales);
    const bool agree = blocks.shape(0) == scales.shape(0) && blocks.shape(1) == scales.shape(1);
    if (!agree || extent(blocks, 2) != kBlockBytes) {
        throw std::invalid_argument("blocks " + shape_text(blocks) + " and scales " + shape_text(scales) +
                                    " are not [rows, groups, 16] and [rows, groups]");
    }
}

template <class Words>
void require_matrix(const char* name, const Words& matrix, std::ptrdiff_t rows, std::ptrdiff_t columns) {
    require_contiguous_rows(name, matrix);
    if (extent(matrix, 0) != rows || extent(matrix, 1) != columns) {
        throw std::invalid_argument(std::string(name) + " " + shape_text(matrix) + " is not [" +
                                    std::to_string(rows) + ", " + std::to_string(columns) + "]");
    }
}

template <class Packed, class Blocks, class Scales>
Packed describe(const Blocks& blocks, const Scales& scales) {
    require_packed(blocks, scales);
    return {blocks.data(),     row_bytes(blocks), scales.data(),
            row_bytes(scales), extent(blocks, 0), extent(blocks, 1)};
}

MatrixSink describe_sink(const WordsOut& out) {
    return {reinterpret_cast<std::uint8_t*>(out.data()), row_bytes(out)};
}

void decode(const BytesIn3& blocks, const BytesIn2& scales, const WordsOut& out, const std::string& isa) {
    const auto in = describe<PackedView>(blocks, scales);
    require_matrix("out", out, in.rows, in.groups * kBlockValues);
    const Kernels& kernels = select_kernels(isa);
    nb::gil_scoped_release released;
    kernels.decode(in, describe_sink(out));
}

void decode_transposed(const BytesIn3& blocks, const BytesIn2& scales, const WordsOut& out,
                       const std::string& isa) {
    const auto in = describe<PackedView>(blocks, scales);
    require_matrix("out", out, in.groups * kBlockValues, in.rows);
    const Kernels& kernels = select_kernels(isa);
    nb::gil_scoped_release released;
    kernels.decode_transposed(in, describe_sink(out));
}

nb::tuple encode_transposed(const WordsIn& values, const BytesOut3& blocks, const BytesOut2& scales,
                            const std::string& isa) {
    const auto out = describe<PackedSink>(blocks, scales);
    require_matrix("values", values, out.groups * kBlockValues, out.rows);
    const Kernels& kernels = select_kernels(isa);
    const MatrixView in = {reinterpret_cast<const std::uint8_t*>(values.data()), row_bytes(values)};
    EncodeReport report;
    {
        nb::gil_scoped_release released;
        report = kernels.encode_transposed(in, out);
    }
    const nb::object bad = report.bad_row < 0
                               ? nb::none()
                               : nb::object(nb::make_tuple(report.bad_row, report.bad_block));
    return nb::make_tuple(report.inexact_blocks, report.error_sq, report.norm_sq, bad);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
    return names;
}

}  // namespace

void bind(nb::module_& module) {
    module.def("instruction_sets", &instruction_sets, "Names that `isa` may have on this machine, best first.");
    module.def("decode", &decode, "blocks"_a.noconvert(), "scales"_a.noconvert(), "out"_a.noconvert(), "isa"_a = "");
    module.def("decode_transposed", &decode_transposed, "blocks"_a.noconvert(), "scales"_a.noconvert(),
               "out"_a.noconvert(), "isa"_a = "");
    module.def("encode_transposed", &encode_transposed, "values"_a.noconvert(), "blocks"_a.noconvert(),
               "scales"_a.noconvert(), "isa"_a = "");
}

}  // namespace moe_surgery::mxfp4
