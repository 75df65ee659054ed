// Measures of experts' outputs: plain loops, which the compiler turns into the instruction set's.
#pragma once

#include "lane_math.inl"

namespace moe_surgery::cpu {
namespace {

struct MeasureKernels {
    // The norm of a row, and its least and largest value.
    static double measure(const float* row, std::ptrdiff_t columns, float* least, float* largest) {
        constexpr std::ptrdiff_t kParts = 8;
        double squares[kParts] = {};
        float low[kParts], high[kParts];
        for (std::ptrdiff_t part = 0; part < kParts; ++part) low[part] = high[part] = row[0];
        const auto add = [&](std::ptrdiff_t part, float value) {
            squares[part] += static_cast<double>(value) * static_cast<double>(value);
            low[part] = value < low[part] ? value : low[part];
            high[part] = value > high[part] ? value : high[part];
        };
        std::ptrdiff_t i = 0;
        for (; i + kParts <= columns; i += kParts) {
            for (std::ptrdiff_t part = 0; part < kParts; ++part) add(part, row[i + part]);
        }
        for (; i < columns; ++i) add(0, row[i]);
        double total = 0.0;
        *least = low[0];
        *largest = high[0];
        for (std::ptrdiff_t part = 0; part < kParts; ++part) {
            total += squares[part];
            *least = low[part] < *least ? low[part] : *least;
            *largest = high[part] > *largest ? high[part] : *largest;
        }
        return __builtin_sqrt(total);
    }

    static void add_weighted(const float* row, std::ptrdiff_t columns, float weight, bool first, float* __restrict y) {
        if (first) {
            for (std::ptrdiff_t r = 0; r < columns; ++r) y[r] = weight * row[r];
        } else {
            for (std::ptrdiff_t r = 0; r < columns; ++r) y[r] += weight * row[r];
        }
    }

    static void add_to_doubles(const float* row, std::ptrdiff_t columns, double* __restrict sums) {
        for (std::ptrdiff_t r = 0; r < columns; ++r) sums[r] += static_cast<double>(row[r]);
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
