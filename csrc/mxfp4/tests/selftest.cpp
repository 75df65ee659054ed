// Compares every available implementation with the scalar one, without Python.
//
//     c++ -std=c++17 -O2 -Icsrc csrc/tests/selftest.cpp csrc/{scalar,avx2,avx512,neon,dispatch}.cpp
//
// Add -fsanitize=address,undefined to find stray accesses: every buffer has exactly its size.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../dispatch.hpp"
#include "../mxfp4.hpp"

using namespace moe_surgery::mxfp4;

namespace {

using Bytes = std::vector<std::uint8_t>;

struct Shape {
    std::ptrdiff_t rows;
    std::ptrdiff_t groups;
};

enum class Scales { kUsual, kLow, kHigh, kAny };
// kSearched: largest values of 4 or 8 times a scale, nearly, beside values near 1/4, 1/2, 3/4 and 3/2 of it,
// so that each of three scales is the best one for some blocks.
enum class Values { kUsual, kSubnormal, kAny, kSearched };

Bytes random_bytes(std::mt19937& random, std::ptrdiff_t size) {
    Bytes bytes(static_cast<std::size_t>(size));
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
    return bytes;
}

Bytes random_scales(std::mt19937& random, std::ptrdiff_t size, Scales kind) {
    Bytes scales = random_bytes(random, size);
    for (auto& scale : scales) {
        if (kind == Scales::kUsual) scale = static_cast<std::uint8_t>(2 + scale % 251);
        if (kind == Scales::kLow) scale = static_cast<std::uint8_t>(scale % 5);
        if (kind == Scales::kHigh) scale = static_cast<std::uint8_t>(250 + scale % 6);
    }
    return scales;
}

std::uint16_t searched_value(std::uint16_t bits, bool large) {
    // 3.98 to 4.14 or so; else 1/4, 1/2, 3/4 and 3/2 with a little more or less.
    static const std::uint16_t middles[4] = {0x3e80, 0x3f00, 0x3f40, 0x3fc0};
    const unsigned magnitude =
        large ? 0x407du + (bits & 7u) : middles[(bits >> 8) & 3] + (bits & 7u) - 4u;
    return static_cast<std::uint16_t>((bits & 0x8000) | magnitude);
}

Bytes random_values(std::mt19937& random, std::ptrdiff_t count, Values kind) {
    Bytes bytes(static_cast<std::size_t>(2 * count));
    for (std::ptrdiff_t i = 0; i < count; ++i) {
        std::uint16_t bits = static_cast<std::uint16_t>(random());
        if (kind == Values::kUsual) bits = static_cast<std::uint16_t>((bits & 0x87ff) | 0x3800);
        if (kind == Values::kSubnormal) bits = static_cast<std::uint16_t>(bits & 0x82ff);
        if (kind == Values::kSearched) bits = searched_value(bits, random() % 32 == 0);
        std::memcpy(bytes.data() + 2 * i, &bits, sizeof bits);
    }
    return bytes;
}

PackedView view(const Bytes& blocks, const Bytes& scales, Shape shape) {
    return {blocks.data(), shape.groups * 16, scales.data(), shape.groups, shape.rows, shape.groups};
}

using Decode = void (*)(const PackedView&, const MatrixSink&);

Bytes run_decode(Decode decode, const PackedView& in, std::ptrdiff_t row_values) {
    Bytes out(static_cast<std::size_t>(in.rows * in.groups * 64), 0xa5);
    decode(in, {out.data(), row_values * 2});
    return out;
}

struct Encoded {
    Bytes blocks;
    Bytes scales;
    EncodeReport report;
};

Encoded run_encode(const Kernels& kernels, const Bytes& values, Shape shape) {
    Encoded out;
    out.blocks.assign(static_cast<std::size_t>(shape.rows * shape.groups * 16), 0xa5);
    out.scales.assign(static_cast<std::size_t>(shape.rows * shape.groups), 0xa5);
    const PackedSink sink = {out.blocks.data(), shape.groups * 16, out.scales.data(),
                             shape.groups,      shape.rows,        shape.groups};
    out.report = kernels.encode_transposed({values.data(), shape.rows * 2}, sink);
    return out;
}

bool close(double a, double b) { return std::fabs(a - b) <= 1e-12 * std::fabs(b); }

bool same_encoding(const Encoded& a, const Encoded& b) {
    return a.blocks == b.blocks && a.scales == b.scales &&
           a.report.inexact_blocks == b.report.inexact_blocks && a.report.bad_row == b.report.bad_row &&
           a.report.bad_block == b.report.bad_block && close(a.report.error_sq, b.report.error_sq) &&
           close(a.report.norm_sq, b.report.norm_sq);
}

int check_decode(const Kernels& kernels, const Kernels& scalar, std::mt19937& random, Shape shape) {
    int failures = 0;
    for (Scales kind : {Scales::kUsual, Scales::kLow, Scales::kHigh, Scales::kAny}) {
        const Bytes blocks = random_bytes(random, shape.rows * shape.groups * 16);
        const Bytes scales = random_scales(random, shape.rows * shape.groups, kind);
        const PackedView in = view(blocks, scales, shape);
        const std::ptrdiff_t width = shape.groups * 32;
        failures += run_decode(kernels.decode, in, width) != run_decode(scalar.decode, in, width);
        failures += run_decode(kernels.decode_transposed, in, shape.rows) !=
                    run_decode(scalar.decode_transposed, in, shape.rows);
    }
    return failures;
}

int check_encode(const Kernels& kernels, const Kernels& scalar, std::mt19937& random, Shape shape) {
    int failures = 0;
    for (Values kind : {Values::kUsual, Values::kSubnormal, Values::kAny, Values::kSearched}) {
        const Bytes values = random_values(random, shape.rows * shape.groups * 32, kind);
        failures += !same_encoding(run_encode(kernels, values, shape), run_encode(scalar, values, shape));
    }
    return failures;
}

}  // namespace

int main() {
    const Shape shapes[] = {{1, 1}, {15, 2}, {16, 1}, {31, 3}, {33, 5}, {63, 1}, {64, 4}, {65, 9}, {200, 3}};
    const Kernels& scalar = select_kernels("scalar");
    int failures = 0;
    for (const Kernels* kernels : available_kernels()) {
        std::mt19937 random(1);
        int failed = 0;
        for (Shape shape : shapes) {
            failed += check_decode(*kernels, scalar, random, shape);
            failed += check_encode(*kernels, scalar, random, shape);
        }
        std::printf("%s: %s\n", kernels->name, failed ? "FAILED" : "ok");
        failures += failed;
    }
    return failures ? 1 : 0;
}
