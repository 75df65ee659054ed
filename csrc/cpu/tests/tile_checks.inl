// Tile products against their definition in tiles.hpp, bit for bit, and against double precision.
#pragma once

#if defined(MOE_SURGERY_TILES)

float bf16_rounded(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The value of a row and a token, columns padded to blocks.
float tile_product(bool amx, const Floats& row, const Floats& token) {
    Floats high, low;
    for (float x : token) {
        high.push_back(bf16_rounded(x));
        low.push_back(bf16_rounded(x - high.back()));
    }
    const auto term = [&](const Floats& part, std::size_t c, float sum) { return std::fmaf(row[c], part[c], sum); };
    float value = 0;
    for (std::size_t b = 0; b < row.size(); b += kTileColumns) {
        if (amx) {
            for (const Floats* part : {&high, &low}) {
                float even = 0, odd = 0;
                for (std::size_t c = b; c < b + kTileColumns; c += 2) {
                    even = term(*part, c, even);
                    odd = term(*part, c + 1, odd);
                }
                value += even + odd;
            }
        } else {
            for (std::size_t c = b; c < b + kTileColumns; c += 2) {
                for (const Floats* part : {&high, &low}) value = term(*part, c, term(*part, c + 1, value));
            }
        }
    }
    return value;
}

// What a weight is stored as, and its values, columns padded to blocks.
struct StoredWeight {
    const char* name;
    std::vector<Floats> rows;
    std::function<void(const TileKernels&, std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t, WeightTile*)> load;
};

void check_tile_products(Checked& check, Shape s, const StoredWeight& weight) {
    const std::ptrdiff_t blocks = tiles_of(s.columns, kTileColumns), padded = blocks * kTileColumns;
    const std::ptrdiff_t row_tiles = tiles_of(s.rows, kTileRows), token_tiles = tiles_of(s.tokens, kTileTokens);
    const Floats x = random_floats(s.tokens * s.columns), bias = random_floats(s.rows), factors = random_floats(s.tokens);
    std::vector<Floats> tokens;
    for (std::ptrdiff_t t = 0; t < s.tokens; ++t) {
        tokens.emplace_back(x.begin() + t * s.columns, x.begin() + (t + 1) * s.columns);
        tokens.back().resize(static_cast<std::size_t>(padded));
    }
    for (const Kernels* kernels : available_kernels()) {
        if (!kernels->tiles) continue;
        const TileKernels& tiles = *kernels->tiles;
        std::vector<SplitTile> split(static_cast<std::size_t>(token_tiles * blocks));
        std::vector<WeightTile> weights(static_cast<std::size_t>(row_tiles * blocks));
        std::vector<SumTile> sums(static_cast<std::size_t>(row_tiles * token_tiles));
        Floats y(static_cast<std::size_t>(s.tokens * s.rows), -1.0f), expected(y.size());
        tiles.begin();
        for (std::ptrdiff_t g = 0; g < token_tiles; ++g) {
            const std::ptrdiff_t first = g * kTileTokens, count = std::min(kTileTokens, s.tokens - first);
            std::vector<const float*> rows;
            for (std::ptrdiff_t n = 0; n < count; ++n) rows.push_back(x.data() + (first + n) * s.columns);
            tiles.split(rows.data(), count, s.columns, 0, blocks, split.data() + g * blocks);
        }
        for (std::ptrdiff_t i = 0; i < row_tiles; ++i) {
            weight.load(tiles, i * kTileRows, std::min(kTileRows, s.rows - i * kTileRows), blocks, weights.data() + i * blocks);
        }
        const std::ptrdiff_t half = blocks / 2;  // the sums go on from one call to the next
        for (std::ptrdiff_t i = 0; i < row_tiles; i += 2) {
            const std::ptrdiff_t count = std::min<std::ptrdiff_t>(2, row_tiles - i);
            SumTile* to = sums.data() + i * token_tiles;
            const auto run = [&](std::ptrdiff_t from, std::ptrdiff_t count_blocks, bool first) {
                std::vector<std::ptrdiff_t> loaded;  // all of it, in order, however much there is
                const auto load = [](const void* seen, std::ptrdiff_t n) {
                    static_cast<std::vector<std::ptrdiff_t>*>(const_cast<void*>(seen))->push_back(n);
                };
                const Meanwhile meanwhile = {count_blocks ? i * 7 % 100 : 0, &loaded, load};
                tiles.multiply({weights.data() + i * blocks + from, blocks, count}, {split.data() + from, blocks, token_tiles},
                               count_blocks, first, to, token_tiles, meanwhile);
                check(static_cast<std::ptrdiff_t>(loaded.size()) == meanwhile.count &&
                          std::is_sorted(loaded.begin(), loaded.end()) && (loaded.empty() || loaded.back() == meanwhile.count - 1),
                      kernels->name, "work done meanwhile", s);
            };
            run(0, half, true);
            run(half, blocks - half, false);
        }
        tiles.end();
        for (std::ptrdiff_t g = 0; g < token_tiles; ++g) {
            const std::ptrdiff_t first = g * kTileTokens, count = std::min(kTileTokens, s.tokens - first);
            for (std::ptrdiff_t i = 0; i < row_tiles; ++i) {
                std::vector<float*> out;
                for (std::ptrdiff_t n = 0; n < count; ++n) out.push_back(y.data() + (first + n) * s.rows + i * kTileRows);
                tiles.store(sums[static_cast<std::size_t>(i * token_tiles + g)], std::min(kTileRows, s.rows - i * kTileRows), count,
                            bias.data() + i * kTileRows, factors.data() + first, out.data());
            }
        }
        bool near_exact = true;
        for (std::ptrdiff_t t = 0; t < s.tokens; ++t) {
            for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
                const auto at = static_cast<std::size_t>(t * s.rows + r);
                const Floats &row = weight.rows[static_cast<std::size_t>(r)], &token = tokens[static_cast<std::size_t>(t)];
                const float value = tile_product(std::string(kernels->name) == "amx", row, token);
                expected[at] = (value + bias[static_cast<std::size_t>(r)]) * factors[static_cast<std::size_t>(t)];
                double exact = 0, size = 0;
                for (std::size_t c = 0; c < row.size(); ++c) {
                    exact += static_cast<double>(row[c]) * token[c];
                    size += std::fabs(static_cast<double>(row[c]) * token[c]);
                }
                near_exact = near_exact && std::fabs(value - exact) <= 1e-5 * size;
            }
        }
        check(same(y, expected), kernels->name, weight.name, s);
        check(near_exact, kernels->name, "tiles beside double precision", s);
    }
}

void check_tiles(Checked& check, Shape s) {
    const std::ptrdiff_t padded = tiles_of(s.columns, kTileColumns) * kTileColumns;
    const Bytes values = random_bf16(s.rows * s.columns);
    Bytes transposed(values.size());
    StoredWeight dense = {"tiles of BF16", {}, nullptr}, columns = {"tiles of transposed BF16", {}, nullptr};
    for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
        dense.rows.emplace_back(static_cast<std::size_t>(padded));
        for (std::ptrdiff_t c = 0; c < s.columns; ++c) {
            dense.rows.back()[static_cast<std::size_t>(c)] = static_cast<float>(bf16_value(values, r * s.columns + c));
            std::memcpy(transposed.data() + 2 * (c * s.rows + r), values.data() + 2 * (r * s.columns + c), 2);
        }
    }
    columns.rows = dense.rows;
    const DenseRows rows = {values.data(), 2 * s.columns, s.columns, Dtype::bf16}, by_column = {transposed.data(), 2 * s.rows, s.columns, Dtype::bf16};
    dense.load = [&](const TileKernels& k, std::ptrdiff_t row, std::ptrdiff_t n, std::ptrdiff_t blocks, WeightTile* out) { k.dense(rows, row, n, 0, blocks, out); };
    columns.load = [&](const TileKernels& k, std::ptrdiff_t row, std::ptrdiff_t n, std::ptrdiff_t blocks, WeightTile* out) { k.transposed(by_column, row, n, 0, blocks, out); };
    check_tile_products(check, s, dense);
    check_tile_products(check, s, columns);
    if (s.columns % kBlock) return;

    static const float magnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    const std::ptrdiff_t blocks = s.columns / kBlock;
    const Bytes codes = random_bytes(s.rows * blocks * kBlockBytes), scales = random_bytes(s.rows * blocks, 90, 160);
    StoredWeight packed = {"tiles of MXFP4", {}, nullptr};
    for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
        packed.rows.emplace_back();
        for (std::ptrdiff_t c = 0; c < s.columns; ++c) {
            const std::ptrdiff_t block = r * blocks + c / kBlock;
            const int byte = codes[static_cast<std::size_t>(block * kBlockBytes + c % kBlock / 2)], code = c % 2 ? byte >> 4 : byte & 15;
            packed.rows.back().push_back(std::ldexp(code & 8 ? -magnitudes[code & 7] : magnitudes[code & 7], scales[static_cast<std::size_t>(block)] - 127));
        }
    }
    const Mxfp4Rows mxfp4 = {codes.data(), blocks * kBlockBytes, scales.data(), blocks, s.columns};
    packed.load = [&](const TileKernels& k, std::ptrdiff_t row, std::ptrdiff_t n, std::ptrdiff_t last, WeightTile* out) { k.mxfp4(mxfp4, row, n, 0, last, out); };
    check_tile_products(check, s, packed);
}

// Every code with every scale: the value in BF16 where it is a normal number, 0 below, infinite above.
void check_tile_scales(Checked& check) {
    Bytes codes(16);
    for (int i = 0; i < 16; ++i) codes[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(i | (15 - i) << 4);
    static const float magnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    for (const Kernels* kernels : available_kernels()) {
        if (!kernels->tiles) continue;
        for (int scale = 0; scale < 256; ++scale) {
            const std::uint8_t byte = static_cast<std::uint8_t>(scale);
            std::vector<WeightTile> tile(1);
            kernels->tiles->mxfp4({codes.data(), 16, &byte, 1, 32}, 0, 1, 0, 1, tile.data());
            bool right = true;
            for (int c = 0; c < 32; ++c) {
                const int code = c % 2 ? 15 - c / 2 : c / 2;
                const std::uint32_t bits = std::uint32_t{tile[0].rows[0][c]} << 16;
                float got;
                std::memcpy(&got, &bits, sizeof got);
                const double exact = std::ldexp(code & 8 ? -magnitudes[code & 7] : magnitudes[code & 7], scale - 127);
                const double largest = std::ldexp(1.0, 128), smallest = std::ldexp(1.0, -126);
                if (scale == 255) right = right && !std::isfinite(got);
                else if (std::fabs(exact) >= largest) right = right && std::isinf(got) && (got > 0) == (exact > 0);
                else if (std::fabs(exact) < smallest) right = right && std::fabs(got) < smallest;
                else right = right && got == exact;
                for (std::ptrdiff_t r = 1; r < kTileRows; ++r) right = right && tile[0].rows[r][c] == 0;
            }
            check(right, kernels->name, "scale of MXFP4 in tiles", {scale, 32, 0});
        }
    }
}

// The second product's activations from the first one's sums.
void check_tile_swiglu(Checked& check, std::ptrdiff_t rows) {
    const Floats values = random_floats(4 * kTileRows * kTileTokens), bias = random_floats(64);
    std::vector<SumTile> sums(8);
    for (std::size_t i = 0; i < 4; ++i) std::memcpy(&sums[2 * i], values.data() + i * 256, sizeof(SumTile));
    for (const Kernels* kernels : available_kernels()) {
        if (!kernels->tiles) continue;
        std::vector<SplitTile> out(1);
        kernels->tiles->swiglu(sums.data(), 2, rows, bias.data(), {7.0f, 1.702f}, out.data());
        bool right = true;
        for (std::size_t n = 0; n < 16; ++n) {
            Floats h, z(32);
            for (std::size_t r = 0; r < 64; ++r) h.push_back(values[r * 16 + n] + bias[r]);
            kScalarKernels.swiglu(h.data(), rows / 2, 7.0f, 1.702f, z.data());
            for (std::size_t c = 0; c < 32; ++c) {
                const auto part = [&](const TokenTile& tile) {
                    const std::uint32_t bits = c % 2 ? tile.pairs[c / 2][n] & 0xffff0000u : tile.pairs[c / 2][n] << 16;
                    float value;
                    std::memcpy(&value, &bits, sizeof value);
                    return value;
                };
                const float high = bf16_rounded(z[c]);
                right = right && part(out[0].high) == high && part(out[0].low) == bf16_rounded(z[c] - high);
            }
        }
        check(right, kernels->name, "swiglu in tiles", {rows, 32, 16});
    }
}

#else

void check_tiles(Checked&, Shape) {}
void check_tile_scales(Checked&) {}
void check_tile_swiglu(Checked&, std::ptrdiff_t) {}

#endif
