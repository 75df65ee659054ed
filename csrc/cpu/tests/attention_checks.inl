// Attention against float64, and every instruction set against plain C++; included by selftest.cpp.

// `s.tokens` query heads of `s.columns` over `s.rows` keys, which lie in the opposite order.
struct AttentionCase {
    AttentionCase(Shape shape, bool f32, std::ptrdiff_t queries)
        : s(shape), is_f32(f32), q(random_floats(queries * s.tokens * s.columns)), sinks(random_floats(s.tokens)),
          floats(random_floats(2 * s.rows * s.columns)) {
        const std::size_t size = is_f32 ? 4 : 2;
        stored.resize(floats.size() * size);
        for (std::size_t i = 0; i < floats.size(); ++i) {
            std::memcpy(stored.data() + i * size, reinterpret_cast<const std::uint8_t*>(&floats[i]) + 4 - size, size);
        }
        for (std::ptrdiff_t r = s.rows - 1; r >= 0; --r) slots.push_back(static_cast<std::int32_t>(r));
    }

    KeyRange range() const {
        const std::ptrdiff_t stride = s.columns * (is_f32 ? 4 : 2);
        return {stored.data(), stored.data() + s.rows * stride, stride, stride, slots.data(), s.rows, s.columns, is_f32};
    }
    double value(std::ptrdiff_t i) const { return is_f32 ? floats[static_cast<std::size_t>(i)] : bf16_value(stored, i); }

    // Of head h of a query, with keys first .. last.
    std::vector<double> exact(const float* query, std::ptrdiff_t h, std::ptrdiff_t first, std::ptrdiff_t last) const {
        std::vector<double> result(static_cast<std::size_t>(s.columns));
        double total = std::exp(static_cast<double>(sinks[static_cast<std::size_t>(h)]));
        for (std::ptrdiff_t i = first; i < last; ++i) {
            const std::ptrdiff_t row = slots[static_cast<std::size_t>(i)] * s.columns;
            double score = 0;
            for (std::ptrdiff_t c = 0; c < s.columns; ++c) score += query[c] * value(row + c);
            const double weight = std::exp(score / std::sqrt(static_cast<double>(s.columns)));
            total += weight;
            for (std::ptrdiff_t c = 0; c < s.columns; ++c) result[static_cast<std::size_t>(c)] += weight * value(s.rows * s.columns + row + c);
        }
        for (double& sum : result) sum /= total;
        return result;
    }
    bool near(const float* got, const float* query, std::ptrdiff_t h, std::ptrdiff_t first, std::ptrdiff_t last,
              double error = 1e-5) const {
        const std::vector<double> expected = exact(query, h, first, last);
        for (std::size_t c = 0; c < expected.size(); ++c) {
            if (!(std::fabs(got[c] - expected[c]) <= error)) return false;
        }
        return true;
    }

    const Shape s;
    const bool is_f32;
    const Floats q, sinks, floats;
    Bytes stored;
    std::vector<std::int32_t> slots;
};

void check_attention(Checked& check, Shape s, bool is_f32) {
    const AttentionCase a(s, is_f32, 1);
    const auto run = [&](const Kernels& kernels, std::ptrdiff_t at_once) {
        Floats out(a.q.size()), scores(static_cast<std::size_t>(attention_scratch(s.rows)));
        for (std::ptrdiff_t h = 0; h < s.tokens; h += at_once) {
            kernels.attention(a.q.data() + h * s.columns, s.columns, a.sinks.data() + h, std::min(at_once, s.tokens - h), a.range(), scores.data(), out.data() + h * s.columns);
        }
        return out;
    };
    const Floats expected = run(kScalarKernels, 1);
    for (std::ptrdiff_t h = 0; h < s.tokens; ++h) {
        check(a.near(expected.data() + h * s.columns, a.q.data() + h * s.columns, h, 0, s.rows), "scalar", "attention", s);
    }
    for (const Kernels* kernels : available_kernels()) {
        for (std::ptrdiff_t at_once : {std::ptrdiff_t{1}, s.tokens}) check(same(run(*kernels, at_once), expected), kernels->name, "attention", s);
    }
}

// Queries that see fewer keys one after the other, together and alone.
void check_attention_tile(Checked& check, Shape s, bool is_f32) {
    const AttentionCase a(s, is_f32, kQueriesAtOnce);
    const std::ptrdiff_t width = s.tokens * s.columns;
    const auto first = [&](std::ptrdiff_t i) { return s.rows * i / 5; };
    const auto last = [&](std::ptrdiff_t i) { return std::max(first(i), s.rows - i); };
    const auto run = [&](const Kernels& kernels, std::ptrdiff_t at_once) {
        const std::ptrdiff_t blocks = (s.rows + kKeysAtOnce - 1) / kKeysAtOnce, size = kKeysAtOnce * s.columns;
        Floats transposed(static_cast<std::size_t>(blocks * size)), out(a.q.size());
        for (std::ptrdiff_t b = 0; b < blocks; ++b) {
            kernels.transpose_keys(a.range(), b * kKeysAtOnce, std::min(kKeysAtOnce, s.rows - b * kKeysAtOnce), transposed.data() + b * size);
        }
        Floats scratch(static_cast<std::size_t>(kQueriesAtOnce * s.tokens * tile_scores(s.rows)));
        for (std::ptrdiff_t i = 0; i < kQueriesAtOnce; i += at_once) {
            QueryTile tile = {};
            for (; tile.queries < at_once; ++tile.queries) {
                const std::ptrdiff_t n = tile.queries, query = i + n;
                tile.q[n] = a.q.data() + query * width;
                tile.out[n] = out.data() + query * width;
                tile.first[n] = first(query);
                tile.last[n] = last(query);
            }
            kernels.attention_tile(tile, s.columns, a.sinks.data(), s.tokens, a.range(), transposed.data(), scratch.data());
        }
        return out;
    };
    const Floats expected = run(kScalarKernels, 1);
    for (std::ptrdiff_t i = 0; i < kQueriesAtOnce; ++i) {
        for (std::ptrdiff_t h = 0; h < s.tokens; ++h) {
            const std::ptrdiff_t at = i * width + h * s.columns;
            check(a.near(expected.data() + at, a.q.data() + at, h, first(i), last(i)), "scalar", "attention_tile", s);
        }
    }
    for (const Kernels* kernels : available_kernels()) {
        for (std::ptrdiff_t at_once : {std::ptrdiff_t{1}, kQueriesAtOnce}) {
            check(same(run(*kernels, at_once), expected), kernels->name, "attention_tile", s);
        }
    }
}

#if defined(MOE_SURGERY_TILES)

// Queries of which each sees other keys, in tiles: together and alone, with keys before the first one seen left out, and
// with NaN and infinity in keys that are not seen.
void check_attention_in_tiles(Checked& check, Shape s, bool is_f32) {
    constexpr std::ptrdiff_t kQueries = 18;
    AttentionCase a(s, is_f32, kQueries);
    const std::ptrdiff_t width = s.tokens * s.columns;
    const auto first = [&](std::ptrdiff_t i) { return s.rows * i / (2 * kQueries); };
    const auto last = [&](std::ptrdiff_t i) { return std::max(first(i), s.rows - (kQueries - 1 - i)); };
    // Queries `begin` to `end`, some at once, over the keys from `drop` on, of which key i has position `position` + i.
    const auto run = [&](const TileKernels& kernels, std::ptrdiff_t begin, std::ptrdiff_t end, std::ptrdiff_t at_once,
                         std::ptrdiff_t heads, std::ptrdiff_t drop, std::ptrdiff_t position) {
        KeyRange range = a.range();
        range.slots += drop;
        range.count -= drop;
        const KeyTiles layout(range);
        const std::ptrdiff_t offset = (position + drop) % kTileKeys, blocks = tiles_of(range.count + offset, kTileKeys);
        const auto tiles = std::make_unique<WeightTile[]>(static_cast<std::size_t>(blocks * layout.count()));
        const auto finite = std::make_unique<bool[]>(static_cast<std::size_t>(blocks));
        for (std::ptrdiff_t b = 0; b < blocks; ++b) finite[static_cast<std::size_t>(b)] = kernels.key_tiles(range, b * kTileKeys - offset, tiles.get() + b * layout.count());
        std::vector<SplitTile> splits(static_cast<std::size_t>(heads * (layout.head_blocks + kKeyBlocks)));
        std::vector<SumTile> sums(static_cast<std::size_t>(heads * (kTileKeys / kTileRows + layout.head_rows)));
        Floats out(a.q.size());
        for (std::ptrdiff_t i = begin; i < end; i += at_once) {
            for (std::ptrdiff_t h = 0; h < s.tokens; h += heads) {
                AttentionPiece piece = {a.q.data() + i * width + h * s.columns, s.columns, width, out.data() + i * width + h * s.columns,
                                        s.columns, width, a.sinks.data() + h, std::min(heads, s.tokens - h),
                                        std::min(at_once, end - i), {}, {}, range, offset, tiles.get(), finite.get()};
                for (std::ptrdiff_t n = 0; n < piece.queries; ++n) {
                    piece.first[n] = static_cast<std::int32_t>(first(i + n) - drop + offset);
                    piece.last[n] = static_cast<std::int32_t>(last(i + n) - drop + offset);
                }
                kernels.attend(piece, {splits.data(), splits.data() + heads * layout.head_blocks, sums.data(), sums.data() + heads * (kTileKeys / kTileRows)});
            }
        }
        return out;
    };
    const auto right = [&](const Floats& got, std::ptrdiff_t begin, std::ptrdiff_t end) {
        bool all = true;
        for (std::ptrdiff_t i = begin; i < end; ++i) {
            for (std::ptrdiff_t h = 0; h < s.tokens; ++h) {
                const std::ptrdiff_t at = i * width + h * s.columns;
                all = all && a.near(got.data() + at, a.q.data() + at, h, first(i), last(i), 1e-4);
            }
        }
        return all;
    };
    const auto equal = [&](const Floats& x, const Floats& y, std::ptrdiff_t begin, std::ptrdiff_t end) {
        return std::memcmp(x.data() + begin * width, y.data() + begin * width, static_cast<std::size_t>((end - begin) * width) * sizeof(float)) == 0;
    };
    for (const Kernels* kernels : available_kernels()) {
        if (!kernels->tiles || !kernels->tiles->attend) continue;
        const TileKernels& tiles = *kernels->tiles;
        const std::ptrdiff_t heads = std::min(s.tokens, kTileHeads);
        for (std::ptrdiff_t position : {0, 41}) {
            const Floats expected = run(tiles, 0, kQueries, kTileTokens, heads, 0, position);
            check(right(expected, 0, kQueries), kernels->name, "attention in tiles", s);
            check(equal(run(tiles, 0, kQueries, 1, 1, 0, position), expected, 0, kQueries), kernels->name, "attention in tiles, alone", s);
            const std::ptrdiff_t from = kQueries / 2;
            check(equal(run(tiles, from, kQueries, kTileTokens, heads, first(from), position), expected, from, kQueries), kernels->name, "attention in tiles, fewer keys", s);
        }
        const AttentionCase kept = a;
        const auto spoil = [&](std::ptrdiff_t begin, std::ptrdiff_t end) {  // keys and values
            const std::uint32_t special[2] = {0x7fc00000u, 0xff800000u};
            const std::size_t size = is_f32 ? 4 : 2;
            for (std::ptrdiff_t key = begin; key < end; ++key) {
                for (std::ptrdiff_t c = 0; c < 2 * s.columns; ++c) {
                    const std::ptrdiff_t at = (c / s.columns * s.rows + a.slots[static_cast<std::size_t>(key)]) * s.columns + c % s.columns;
                    std::memcpy(a.stored.data() + static_cast<std::size_t>(at) * size, reinterpret_cast<const std::uint8_t*>(&special[c % 2]) + 4 - size, size);
                }
            }
        };
        const std::ptrdiff_t middle = kQueries / 2;
        const Floats clean = run(tiles, 0, kQueries, kTileTokens, heads, 0, 7);
        spoil(0, first(middle));
        check(equal(run(tiles, 0, kQueries, kTileTokens, heads, 0, 7), clean, middle, kQueries), kernels->name, "attention in tiles, NaN before", s);
        a.stored = kept.stored;
        spoil(last(middle), s.rows);
        check(equal(run(tiles, 0, kQueries, kTileTokens, heads, 0, 7), clean, 0, middle + 1), kernels->name, "attention in tiles, NaN after", s);
        a.stored = kept.stored;
    }
}

#else

void check_attention_in_tiles(Checked&, Shape, bool) {}

#endif
