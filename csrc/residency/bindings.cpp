// Python binding of the reads; moe_surgery.runtime.residency.reads, the only caller, keeps files and memory alive.
#include "bindings.hpp"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "reads.hpp"

namespace moe_surgery::residency {
namespace {

namespace nb = nanobind;

// descriptor, offset, address, bytes, of which needed
using PieceTuple = std::tuple<int, std::int64_t, std::uintptr_t, std::ptrdiff_t, std::ptrdiff_t>;

std::int64_t start(Reads& reads, const std::vector<PieceTuple>& tuples, int kind) {
    if (kind < 0 || kind >= kClasses) throw std::invalid_argument("no such class of loads");
    std::vector<Piece> pieces;
    for (const auto& [fd, offset, to, bytes, needed] : tuples) {
        pieces.push_back({fd, offset, reinterpret_cast<std::uint8_t*>(to), bytes, needed});
    }
    return reads.start(std::move(pieces), kind);
}

std::tuple<bool, int, std::ptrdiff_t> outcome(const Reads& reads, std::int64_t load) {
    const Outcome outcome = reads.outcome(load);
    return {outcome.finished, outcome.code, outcome.piece};
}

}  // namespace

void bind(nb::module_& module) {
    nb::class_<Reads>(module, "Reads")
        .def(nb::init<int>())
        .def("start", &start)
        .def("hurry", &Reads::hurry)
        .def("cancel", &Reads::cancel)
        .def("outcome", &outcome)
        .def("wait", &Reads::wait, nb::call_guard<nb::gil_scoped_release>())
        .def("forget", &Reads::forget)
        .def("close", &Reads::close, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("bytes", &Reads::bytes);
}

}  // namespace moe_surgery::residency
