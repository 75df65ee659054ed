// Products in tiles of integers against their definition in integer_tiles.hpp, bit for bit, and against double precision.
#pragma once

#if defined(MOE_SURGERY_TILES)

// One segment of a token: integers, and what one of them is worth.
struct QuantizedSegment {
    std::vector<std::int64_t> integers;
    float factor;
};

QuantizedSegment quantized_segment(const float* x, std::ptrdiff_t count) {
    float absmax = 0;
    for (std::ptrdiff_t c = 0; c < count; ++c) absmax = std::max(absmax, std::fabs(x[c]));
    const bool zero = absmax < 1e-30f;
    const float scale = zero ? 0.0f : kQuantMax / absmax;
    QuantizedSegment result = {{}, zero ? 0.0f : absmax / kQuantMax};
    for (std::ptrdiff_t c = 0; c < count; ++c) result.integers.push_back(std::lrintf(x[c] * scale));
    return result;
}

// Rows of MXFP4 with their doubled values.
struct PackedRows {
    PackedRows(std::ptrdiff_t rows, std::ptrdiff_t columns, int least, int largest)
        : columns(columns), blocks(columns / kBlock), codes(random_bytes(rows * blocks * kBlockBytes)),
          scales(random_bytes(rows * blocks, least, largest)) {}

    Mxfp4Rows view() const { return {codes.data(), blocks * kBlockBytes, scales.data(), blocks, columns}; }
    int scale(std::ptrdiff_t row, std::ptrdiff_t block) const { return scales[static_cast<std::size_t>(row * blocks + block)]; }
    int doubled(std::ptrdiff_t row, std::ptrdiff_t column) const {
        static const int magnitudes[8] = {0, 1, 2, 3, 4, 6, 8, 12};
        const int byte = codes[static_cast<std::size_t>((row * blocks + column / kBlock) * kBlockBytes + column % kBlock / 2)];
        const int code = column % 2 ? byte >> 4 : byte & 15;
        return code & 8 ? -magnitudes[code & 7] : magnitudes[code & 7];
    }

    std::ptrdiff_t columns, blocks;
    Bytes codes, scales;
};

// A row times a token, over all bands of `bands`, a bit each, of every segment.
float integer_product(const PackedRows& rows, std::ptrdiff_t row, const float* x, const std::vector<std::uint64_t>& bands) {
    const Segments segments(rows.columns);
    float value = 0;
    for (std::ptrdiff_t s = 0; s < segments.count; ++s) {
        const std::ptrdiff_t first = segments.first_column(s), last = segments.last_column(s);
        const QuantizedSegment token = quantized_segment(x + first, last - first);
        int largest = 0;
        for (std::ptrdiff_t b = first / kBlock; b < last / kBlock; ++b) largest = std::max(largest, rows.scale(row, b));
        for (int band = 0; band < kBands; ++band) {
            if (!(bands[static_cast<std::size_t>(s)] >> band & 1)) continue;
            std::int64_t high = 0, low = 0;
            for (std::ptrdiff_t c = first; c < last; ++c) {
                const int below = largest - rows.scale(row, c / kBlock);
                if (below / 4 != band) continue;
                const std::int64_t weight = rows.doubled(row, c) * (1 << (3 - below % 4)), x_at = token.integers[static_cast<std::size_t>(c - first)];
                const std::int64_t least = static_cast<std::int8_t>(x_at & 255);
                high += weight * ((x_at - least) / 256);
                low += weight * least;
            }
            const float factor = static_cast<float>(std::ldexp(1.0, largest - 3 - 4 * band - 128));
            value = std::fmaf(std::fmaf(static_cast<float>(high), 256.0f, static_cast<float>(low)) * factor, token.factor, value);
        }
    }
    return value;
}

void check_integer_products(Checked& check, Shape s, int least, int largest) {
    const PackedRows rows(s.rows, s.columns, least, largest);
    const Segments segments(s.columns);
    const std::ptrdiff_t row_tiles = tiles_of(s.rows, kTileRows), token_tiles = tiles_of(s.tokens, kTileTokens);
    const Floats x = random_floats(s.tokens * s.columns);
    for (const Kernels* kernels : available_kernels()) {
        if (!kernels->tiles || !kernels->tiles->integers) continue;
        const IntegerKernels& integers = *kernels->tiles->integers;
        std::vector<SplitQuads> quads(static_cast<std::size_t>(token_tiles * segments.tiles));
        Floats factors(static_cast<std::size_t>(token_tiles * segments.count * kTileTokens)), columns(kSegmentColumns * kTileTokens);
        for (std::ptrdiff_t g = 0; g < token_tiles; ++g) {
            std::vector<const float*> tokens;
            for (std::ptrdiff_t n = g * kTileTokens; n < std::min(s.tokens, (g + 1) * kTileTokens); ++n) tokens.push_back(x.data() + n * s.columns);
            for (std::ptrdiff_t i = 0; i < segments.count; ++i) {
                const std::ptrdiff_t first = segments.first_column(i), last = segments.last_column(i);
                integers.columns(tokens.data(), static_cast<std::ptrdiff_t>(tokens.size()), first, last, columns.data());
                integers.quantize(columns.data(), last - first, quads.data() + g * segments.tiles + segments.first(i),
                                  factors.data() + (g * segments.count + i) * kTileTokens);
            }
        }
        std::vector<SumTile> sums(static_cast<std::size_t>(row_tiles * token_tiles));
        bool right = true, near_exact = true;
        for (std::ptrdiff_t i = 0; i < row_tiles; i += 2) {
            const std::ptrdiff_t count = std::min<std::ptrdiff_t>(2, row_tiles - i);
            std::vector<std::uint64_t> bands;
            for (std::ptrdiff_t segment = 0; segment < segments.count; ++segment) {
                const std::ptrdiff_t first = segments.first(segment) * 2, last = std::min(rows.blocks, segments.first(segment + 1) * 2);
                std::uint64_t found = 1;  // and what band 0 reports
                for (int band = 0; band < kBands; ++band) {
                    if (!(found >> band & 1)) continue;
                    std::vector<CodeTile> tiles(2 * kSegmentTiles);
                    Floats row_factors(2 * kTileRows);
                    for (std::ptrdiff_t r = 0; r < std::min(count * kTileRows, s.rows - i * kTileRows); ++r) {
                        found |= integers.codes(rows.view(), i * kTileRows + r, first, last, band, r % kTileRows,
                                                tiles.data() + r / kTileRows * kSegmentTiles, row_factors.data() + r);
                    }
                    const QuadPanel panel = {quads.data() + segments.first(segment), segments.tiles, factors.data() + segment * kTileTokens,
                                             segments.count * kTileTokens, token_tiles};
                    kernels->tiles->begin();
                    integers.multiply({tiles.data(), row_factors.data(), count}, panel, segments.width(segment), segment == 0 && band == 0,
                                      sums.data() + i * token_tiles, token_tiles, {0, nullptr, nullptr});
                    kernels->tiles->end();
                }
                bands.push_back(found);
            }
            for (std::ptrdiff_t r = i * kTileRows; r < std::min(s.rows, (i + count) * kTileRows); ++r) {
                for (std::ptrdiff_t n = 0; n < s.tokens; ++n) {
                    const float got = sums[static_cast<std::size_t>(r / kTileRows * token_tiles + n / kTileTokens)].rows[r % kTileRows][n % kTileTokens];
                    right = right && got == integer_product(rows, r, x.data() + n * s.columns, bands);
                    double exact = 0, size = 0, absmax = 0;
                    for (std::ptrdiff_t c = 0; c < s.columns; ++c) absmax = std::max(absmax, std::fabs(double{x[static_cast<std::size_t>(n * s.columns + c)]}));
                    for (std::ptrdiff_t c = 0; c < s.columns; ++c) {
                        const double weight = std::ldexp(rows.doubled(r, c), rows.scale(r, c / kBlock) - 128);
                        exact += weight * x[static_cast<std::size_t>(n * s.columns + c)];
                        size += std::fabs(weight) * absmax;
                    }
                    near_exact = near_exact && std::fabs(got - exact) <= 1.7e-5 * size;
                }
            }
        }
        check(right, kernels->name, "tiles of integers", s);
        check(near_exact, kernels->name, "tiles of integers beside double precision", s);
    }
}

// Values that are not finite, too small to count, and zeros.
void check_integer_activations(Checked& check) {
    for (const Kernels* kernels : available_kernels()) {
        if (!kernels->tiles || !kernels->tiles->integers) continue;
        Floats columns = random_floats(100 * kTileTokens), factors(kTileTokens);
        const auto at = [&](std::ptrdiff_t column, std::ptrdiff_t token) -> float& { return columns[static_cast<std::size_t>(column * kTileTokens + token)]; };
        at(7, 1) = std::nanf("");
        at(99, 2) = INFINITY;
        for (std::ptrdiff_t c = 0; c < 100; ++c) at(c, 3) = 1e-31f;
        for (std::ptrdiff_t c = 0; c < 100; ++c) at(c, 4) = 0;
        std::vector<SplitQuads> tiles(2);
        kernels->tiles->integers->quantize(columns.data(), 100, tiles.data(), factors.data());
        bool right = std::isnan(factors[1]) && std::isnan(factors[2]) && factors[3] == 0 && factors[4] == 0;
        for (std::ptrdiff_t n = 0; n < kTileTokens; ++n) {
            if (n == 1 || n == 2) continue;
            Floats token;
            for (std::ptrdiff_t c = 0; c < 100; ++c) token.push_back(at(c, n));
            const QuantizedSegment expected = quantized_segment(token.data(), 100);
            right = right && factors[static_cast<std::size_t>(n)] == expected.factor;
            for (std::ptrdiff_t c = 0; c < 2 * kIntegerColumns; ++c) {
                const SplitQuads& tile = tiles[static_cast<std::size_t>(c / kIntegerColumns)];
                const auto byte = [&](const QuadTile& quads) {
                    return static_cast<std::int8_t>(quads.quads[c % kIntegerColumns / 4][n] >> (8 * (c % 4)));
                };
                right = right && 256 * byte(tile.high) + byte(tile.low) == (c < 100 ? expected.integers[static_cast<std::size_t>(c)] : 0);
            }
        }
        check(right, kernels->name, "activations as integers", {0, 100, 16});
    }
}

#else

void check_integer_products(Checked&, Shape, int, int) {}
void check_integer_activations(Checked&) {}

#endif
