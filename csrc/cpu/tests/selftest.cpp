// The CPU kernels without Python: every instruction set that runs here against plain C++, bit for bit, plain
// C++ against double precision, and the threads. Exits with 1 where something differs.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../engine.hpp"
#include "../integer_tiles.hpp"
#include "../pool.hpp"

using namespace moe_surgery::cpu;

namespace {

using Floats = std::vector<float>;
// No spare bytes at the end, so that a sanitizer reports reads past it.
using Bytes = std::vector<std::uint8_t>;

std::mt19937 random_bits(1);

Floats random_floats(std::ptrdiff_t count) {
    std::normal_distribution<float> normal;
    Floats result(static_cast<std::size_t>(count));
    for (float& value : result) value = normal(random_bits);
    return result;
}

Bytes random_bytes(std::ptrdiff_t count, int low = 0, int high = 255) {
    std::uniform_int_distribution<int> uniform(low, high);
    Bytes result(static_cast<std::size_t>(count));
    for (auto& byte : result) byte = static_cast<std::uint8_t>(uniform(random_bits));
    return result;
}

Bytes random_bf16(std::ptrdiff_t count) {
    Bytes result(static_cast<std::size_t>(2 * count));
    const Floats values = random_floats(count);
    for (std::size_t i = 0; i < values.size(); ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, &values[i], 4);
        result[2 * i] = static_cast<std::uint8_t>(bits >> 16);
        result[2 * i + 1] = static_cast<std::uint8_t>(bits >> 24);
    }
    return result;
}

double bf16_value(const Bytes& bytes, std::ptrdiff_t i) {
    const auto at = static_cast<std::size_t>(2 * i);
    const std::uint32_t bits = std::uint32_t{bytes[at]} << 16 | std::uint32_t{bytes[at + 1]} << 24;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Values of a dtype: normal ones, and of F16 any that are numbers, subnormal ones among them.
Bytes random_values(std::ptrdiff_t count, Dtype dtype) {
    if (dtype == Dtype::bf16) return random_bf16(count);
    if (dtype == Dtype::f16) {
        Bytes result = random_bytes(2 * count);
        for (std::size_t i = 1; i < result.size(); i += 2) {
            if ((result[i] & 0x7c) == 0x7c) result[i] &= 0xbf;  // neither infinite nor NaN
        }
        return result;
    }
    const Floats values = random_floats(count);
    Bytes result(static_cast<std::size_t>(4 * count));
    std::memcpy(result.data(), values.data(), result.size());
    return result;
}

double value_of(const Bytes& bytes, std::ptrdiff_t i, Dtype dtype) {
    if (dtype == Dtype::bf16) return bf16_value(bytes, i);
    if (dtype == Dtype::f32) {
        float value;
        std::memcpy(&value, bytes.data() + 4 * i, 4);
        return value;
    }
    const auto at = static_cast<std::size_t>(2 * i);
    const int bits = bytes[at] | bytes[at + 1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

const char* const kDtypes[] = {"bf16", "f16", "f32"};

struct Shape {
    std::ptrdiff_t rows, columns, tokens;
};

bool same(const Floats& a, const Floats& b) { return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0; }

bool near(const Floats& got, const std::vector<double>& exact, const std::vector<double>& size, double error) {
    for (std::size_t i = 0; i < got.size(); ++i) {
        if (!(std::fabs(got[i] - exact[i]) <= error * size[i])) return false;
    }
    return true;
}

struct Checked {
    int failures = 0;
    void operator()(bool holds, const char* set, const char* what, Shape shape) {
        if (holds) return;
        ++failures;
        std::printf("FAILED %s %s: %td x %td, %td tokens\n", set, what, shape.rows, shape.columns, shape.tokens);
    }
};

// `run(kernels, y)` fills y [tokens, rows]; the sums are `exact`, of terms that add up to `size`.
template <class Run>
void compare(Checked& check, const char* what, Shape shape, Run run, const std::vector<double>& exact,
             const std::vector<double>& size, double error) {
    const std::size_t all = static_cast<std::size_t>(shape.rows * shape.tokens);
    Floats expected(all);
    run(kScalarKernels, expected);
    check(near(expected, exact, size, error), "scalar", what, shape);
    for (const Kernels* kernels : available_kernels()) {
        Floats result(all, -1.0f);
        run(*kernels, result);
        check(same(result, expected), kernels->name, what, shape);
    }
}

void check_dense(Checked& check, Shape s, Dtype dtype) {
    const std::ptrdiff_t size_of_value = bytes_of(dtype);
    const std::string name = kDtypes[static_cast<int>(dtype)];
    const Bytes weight = random_values(s.rows * s.columns, dtype);
    const Floats x = random_floats(s.tokens * s.columns);
    std::vector<double> exact, size;
    for (std::ptrdiff_t t = 0; t < s.tokens; ++t) {
        for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
            double sum = 0, terms = 0;
            for (std::ptrdiff_t c = 0; c < s.columns; ++c) {
                const double term = value_of(weight, r * s.columns + c, dtype) * x[static_cast<std::size_t>(t * s.columns + c)];
                sum += term;
                terms += std::fabs(term);
            }
            exact.push_back(sum);
            size.push_back(terms);
        }
    }
    compare(check, (name + " dense_rows").c_str(), s, [&](const Kernels& kernels, Floats& y) {
        const std::ptrdiff_t width = groups_of(s.columns) * kGroup;
        Floats deinterleave(static_cast<std::size_t>(s.tokens * width));
        std::vector<Deinterleaved> rows;
        for (std::ptrdiff_t t = 0; t < s.tokens; ++t) {
            rows.push_back(deinterleave.data() + t * width);
            kernels.deinterleave(x.data() + t * s.columns, s.columns, deinterleave.data() + t * width);
        }
        kernels.dense_rows({weight.data(), size_of_value * s.columns, s.columns, dtype}, 0, s.rows, rows.data(), s.tokens, y.data(), s.rows);
    }, exact, size, 1e-6);

    Bytes transposed(weight.size());
    for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
        for (std::ptrdiff_t c = 0; c < s.columns; ++c) {
            std::memcpy(transposed.data() + size_of_value * (c * s.rows + r), weight.data() + size_of_value * (r * s.columns + c),
                        static_cast<std::size_t>(size_of_value));
        }
    }
    compare(check, (name + " dense_transposed").c_str(), s, [&](const Kernels& kernels, Floats& y) {
        std::vector<const float*> rows;
        for (std::ptrdiff_t t = 0; t < s.tokens; ++t) rows.push_back(x.data() + t * s.columns);
        kernels.dense_transposed({transposed.data(), size_of_value * s.rows, s.columns, dtype}, 0, s.rows, rows.data(), s.tokens, y.data(), s.rows);
    }, exact, size, 1e-5);
}

void check_mxfp4(Checked& check, Shape s) {
    static const double values[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    const std::ptrdiff_t blocks = s.columns / kBlock;
    const Bytes codes = random_bytes(s.rows * blocks * kBlockBytes), scales = random_bytes(s.rows * blocks, 110, 140);
    const Floats x = random_floats(s.tokens * s.columns);
    std::vector<double> exact, size;
    for (std::ptrdiff_t t = 0; t < s.tokens; ++t) {
        for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
            double sum = 0, terms = 0;
            for (std::ptrdiff_t c = 0; c < s.columns; ++c) {
                const std::ptrdiff_t block = r * blocks + c / kBlock;
                const int byte = codes[static_cast<std::size_t>(block * kBlockBytes + c % kBlock / 2)];
                const int code = c % 2 ? byte >> 4 : byte & 15;
                const double weight = std::ldexp(code & 8 ? -values[code & 7] : values[code & 7],
                                                 scales[static_cast<std::size_t>(block)] - 127);
                const double term = weight * x[static_cast<std::size_t>(t * s.columns + c)];
                sum += term;
                // Activations are rounded to a part of their block's largest, about 3 here.
                terms += std::fabs(weight) * 4;
            }
            exact.push_back(sum);
            size.push_back(terms);
        }
    }
    compare(check, "mxfp4_rows", s, [&](const Kernels& kernels, Floats& y) {
        const std::ptrdiff_t width = act_blocks_of(s.columns);
        std::vector<ActBlock512> act_blocks(static_cast<std::size_t>(s.tokens * width));
        std::vector<Quantized> rows;
        for (std::ptrdiff_t t = 0; t < s.tokens; ++t) {
            rows.push_back(act_blocks.data() + t * width);
            kernels.quantize(x.data() + t * s.columns, s.columns, act_blocks.data() + t * width);
        }
        const Mxfp4Rows weight = {codes.data(), blocks * kBlockBytes, scales.data(), blocks, s.columns};
        kernels.mxfp4_rows(weight, 0, s.rows, rows.data(), s.tokens, y.data(), s.rows);
    }, exact, size, 2e-5);
}

#include "q8_0_checks.inl"

void check_between(Checked& check, Shape s, Dtype dtype) {
    const Floats h = random_floats(2 * s.columns), x = random_floats(s.columns);
    const Bytes weights_lane = random_values(s.columns, dtype);
    const auto run = [&](const Kernels& kernels) {
        Floats all(static_cast<std::size_t>(2 * s.columns));
        kernels.swiglu(h.data(), s.columns, 7.0f, 1.702f, all.data());
        kernels.rms_norm(x.data(), {weights_lane.data(), dtype}, s.columns, 1e-5f, all.data() + s.columns);
        return all;
    };
    const Floats expected = run(kScalarKernels);
    for (std::ptrdiff_t i = 0; i < s.columns; ++i) {
        const double gate = std::fmin(h[static_cast<std::size_t>(2 * i)], 7.0), up = std::fmax(-7.0, std::fmin(7.0, h[static_cast<std::size_t>(2 * i + 1)]));
        const double exact = (up + 1) * gate / (1 + std::exp(-1.702 * gate));
        check(std::fabs(expected[static_cast<std::size_t>(i)] - exact) <= 1e-6 * (1 + std::fabs(exact)), "scalar", "swiglu", s);
    }
    double squares = 0;
    for (float value : x) squares += static_cast<double>(value) * value;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(s.columns) + 1e-5f);
    for (std::ptrdiff_t i = 0; i < s.columns; ++i) {
        const double exact = x[static_cast<std::size_t>(i)] * scale * value_of(weights_lane, i, dtype);
        check(std::fabs(expected[static_cast<std::size_t>(s.columns + i)] - exact) <= 1e-5 * std::fabs(exact), "scalar", "rms_norm", s);
    }
    for (const Kernels* kernels : available_kernels()) check(same(run(*kernels), expected), kernels->name, "swiglu, rms_norm", s);
}

void check_threads(Checked& check) {
    for (int threads : {1, 2, 3, 7}) {
        for (std::ptrdiff_t count : {0, 1, 2, 100}) {
            std::vector<std::atomic<int>> done(static_cast<std::size_t>(count));
            std::atomic<bool> early{false};
            const auto first = [&](std::ptrdiff_t i, int) { ++done[static_cast<std::size_t>(i)]; };
            const auto second = [&](std::ptrdiff_t i, int) {
                for (const auto& each : done) early = early || each == 0;
                ++done[static_cast<std::size_t>(i)];
            };
            for (int round = 0; round < 50; ++round) {
                for (auto& each : done) each = 0;
                Pool::shared().run(threads, {{count, first}, {count, second}});
                bool all = !early;
                for (const auto& each : done) all = all && each == 2;
                check(all, "threads", "phases", {threads, count, round});
            }
        }
    }
}

#include "attention_checks.inl"
#include "tile_checks.inl"
#include "integer_checks.inl"

}  // namespace

int main() {
    Checked check;
    for (Shape shape : {Shape{1, 32, 1}, {2, 64, 2}, {3, 96, 3}, {7, 128, 4}, {12, 160, 5}, {31, 288, 9}, {64, 480, 1}, {19, 512, 6}, {25, 1120, 35}}) {
        check_mxfp4(check, shape);
        check_q8_0(check, shape);
        for (Dtype dtype : {Dtype::bf16, Dtype::f16, Dtype::f32}) {
            check_dense(check, shape, dtype);
            check_between(check, shape, dtype);
        }
    }
    for (Shape shape : {Shape{1, 1, 1}, {5, 7, 3}, {17, 33, 2}, {40, 66, 8}, {84, 65, 7}}) {
        for (Dtype dtype : {Dtype::bf16, Dtype::f16, Dtype::f32}) {
            check_dense(check, shape, dtype);
            check_between(check, shape, dtype);
        }
    }
    for (Shape shape : {Shape{1, 64, 1}, {2, 64, 4}, {5, 64, 8}, {33, 64, 7}, {130, 64, 9}, {3, 16, 4}, {21, 7, 5}, {18, 80, 6}, {0, 64, 5}}) {
        for (bool is_f32 : {true, false}) {
            check_attention(check, shape, is_f32);
            check_attention_tile(check, shape, is_f32);
            check_attention_in_tiles(check, shape, is_f32);
        }
    }
    for (Shape shape : {Shape{1, 32, 1}, {16, 64, 16}, {17, 96, 33}, {40, 320, 50}, {33, 70, 31}, {5, 7, 18}}) check_tiles(check, shape);
    for (Shape shape : {Shape{1, 32, 1}, {16, 64, 16}, {33, 96, 17}, {20, 1120, 35}}) {
        check_integer_products(check, shape, 118, 121);
        check_integer_products(check, shape, 100, 140);
    }
    check_integer_products(check, {33, 576, 17}, 0, kLargestScale);
    check_integer_activations(check);
    check_tile_scales(check);
    for (std::ptrdiff_t rows : {64, 2, 30}) check_tile_swiglu(check, rows);
    check_threads(check);
    for (const Kernels* kernels : available_kernels()) std::printf("%s\n", kernels->name);
    std::printf("%s\n", check.failures ? "FAILED" : "ok");
    return check.failures ? 1 : 0;
}
