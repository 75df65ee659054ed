// Attention of long steps by products in tiles, over the tile products P.
#pragma once

#include "lane_math.inl"
#include "tiles_avx512.inl"

namespace moe_surgery::cpu {
namespace {

template <class P>
struct TileAttention {
    using Lanes = TileLayout::Lanes;
    using Math = LaneMath<Lanes>;

    // Sixteen values of a head, starting at `column`. Padded with zeros past the head's end; all zeros if `head` is null.
    static __m512 sixteen(const std::uint8_t* head, std::ptrdiff_t column, std::ptrdiff_t head_dim, bool is_f32) {
        const __mmask16 some = head ? TileLayout::mask_of(head_dim - column) : 0;
        if (!some) return _mm512_setzero_ps();
        if (is_f32) return _mm512_maskz_loadu_ps(some, head + 4 * column);
        const __m256i bits = _mm256_maskz_loadu_epi16(some, head + 2 * column);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }

    // The key or value head number i of a block whose first one is number `first` of the range.
    static const std::uint8_t* head_at(const KeyRange& range, bool of_values, std::ptrdiff_t first, std::ptrdiff_t i) {
        const std::ptrdiff_t key = first + i;
        if (key < 0 || key >= range.count) return nullptr;
        return of_values ? range.values + range.slots[key] * range.value_stride : range.keys + range.slots[key] * range.key_stride;
    }

    // Values up to this one are finite in BF16. Others, infinity and NaN are not in tiles: a query that does not see them
    // has a weight of zero, which would not remove them.
    static constexpr float kLargest = 0x1.fep127f;

    static __m512 part_of(__m512 x, bool rest) {
        const __m512 high = TileLayout::rounded(x);
        return rest ? TileLayout::rounded(_mm512_sub_ps(x, high)) : high;
    }

    static bool key_tiles(const KeyRange& range, std::ptrdiff_t first, WeightTile* out) {
        const KeyTiles tiles(range);
        for (std::ptrdiff_t part = 0; part < tiles.parts; ++part) {
            for (std::ptrdiff_t i = 0; i < kTileKeys; ++i) {
                const std::uint8_t* head = head_at(range, false, first, i);
                for (std::ptrdiff_t b = 0; b < tiles.head_blocks; ++b) {
                    const auto value = [&](std::ptrdiff_t column) {
                        return part_of(sixteen(head, b * kTileColumns + column, range.head_dim, range.is_f32), part);
                    };
                    const auto row = _mm512_cvtne2ps_pbh(value(kLanes), value(0));
                    _mm512_store_si512(out[tiles.key(part, i / kTileRows) + b].rows[i % kTileRows], reinterpret_cast<__m512i>(row));
                }
            }
        }
        __mmask16 special = 0;
        for (std::ptrdiff_t d = 0; d < tiles.head_rows; ++d) {
            for (std::ptrdiff_t b = 0; b < kKeyBlocks; ++b) {
                __m512i high[kTileColumns / 2], rest[kTileColumns / 2];
                for (std::ptrdiff_t k = 0; k < kTileColumns / 2; ++k) {
                    const auto value = [&](std::ptrdiff_t i) {
                        const std::uint8_t* head = head_at(range, true, first, b * kTileColumns + i);
                        const __m512 x = sixteen(head, d * kTileRows, range.head_dim, range.is_f32);
                        const __mmask16 large = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(kLargest), _CMP_NLE_UQ);
                        special = special | large;
                        return _mm512_maskz_mov_ps(~large, x);
                    };
                    const __m512 even = value(2 * k), odd = value(2 * k + 1);
                    high[k] = TileLayout::rounded_pairs(even, odd);
                    rest[k] = TileLayout::rest_pairs(even, odd, high[k]);
                }
                store_rows(high, out[tiles.value(0, d) + b]);
                if (tiles.parts == 2) store_rows(rest, out[tiles.value(1, d) + b]);
            }
        }
        return !special;
    }

    // Sixteen rows of pairs that are columns so far.
    static void store_rows(__m512i (&pairs)[kTileColumns / 2], WeightTile& out) {
        TileLayout::transpose(pairs);
        for (std::ptrdiff_t r = 0; r < kTileRows; ++r) _mm512_store_si512(out.rows[r], pairs[r]);
    }

    // One head of a piece: sixteen queries, of which each lane is one.
    struct Softmax {
        __m512 largest, total;
    };

    // Which queries see key number `key`.
    struct Visible {
        __m512i first, last;

        __mmask16 operator()(std::ptrdiff_t key) const {
            const __m512i number = _mm512_set1_epi32(static_cast<int>(key));
            return _mm512_cmple_epi32_mask(first, number) & _mm512_cmplt_epi32_mask(number, last);
        }
    };
    struct AllVisible {
        __mmask16 operator()(std::ptrdiff_t) const { return 0xffff; }
    };

    // Weights times tokens; in float32, weights have a second part `rest` tiles after the first.
    static void multiply(const KeyTiles& tiles, const WeightPanel& weights, std::ptrdiff_t rest, const TokenPanel& tokens,
                         std::ptrdiff_t blocks, bool first, SumTile* sums) {
        constexpr Meanwhile kNothing = {0, nullptr, nullptr};
        if (tiles.parts == 2) {
            P::multiply_sums(weights, rest, tokens, blocks, first, sums, tokens.token_tiles);
        } else {
            P::multiply(weights, tokens, blocks, first, sums, tokens.token_tiles, kNothing);
        }
    }

    // Scores of the block of keys from number `begin` on, of row tiles `stride` apart, to weights: in place, and as
    // tiles. Returns what earlier weights are to be multiplied with.
    template <class Seen>
    static __m512 weights_of(SumTile* scores, std::ptrdiff_t stride, std::ptrdiff_t begin, Seen visible, __m512 factor,
                             Softmax& softmax, SplitTile* out) {
        __m512 largest = softmax.largest;
        for (std::ptrdiff_t i = 0; i < kTileKeys; ++i) {
            float* row = scores[i / kTileRows * stride].rows[i % kTileRows];
            const __m512 score = _mm512_mul_ps(_mm512_load_ps(row), factor);
            _mm512_store_ps(row, score);
            largest = _mm512_mask_max_ps(largest, visible(begin + i), largest, score);
        }
        const __mmask16 grown = _mm512_cmp_ps_mask(largest, softmax.largest, _CMP_NEQ_UQ);
        const __m512 scale = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), grown, Math::exp(_mm512_sub_ps(softmax.largest, largest)));
        __m512 total = _mm512_mul_ps(softmax.total, scale);
        const auto weight = [&](std::ptrdiff_t i) {
            float* row = scores[i / kTileRows * stride].rows[i % kTileRows];
            const __m512 w = _mm512_maskz_mov_ps(visible(begin + i), Math::exp(_mm512_sub_ps(_mm512_load_ps(row), largest)));
            _mm512_store_ps(row, w);
            total = _mm512_add_ps(total, w);
            return w;
        };
        for (std::ptrdiff_t i = 0; i < kTileKeys; i += 2) {
            const __m512 a = weight(i), b = weight(i + 1);
            TileLayout::split_pairs(a, b, i % kTileColumns / 2, out[i / kTileColumns]);
        }
        softmax = {largest, total};
        return scale;
    }

    // Adds weights times those values of a block that its tiles leave out, for the queries that see them.
    static void add_special(const SumTile* weights, std::ptrdiff_t stride, const AttentionPiece& piece, std::ptrdiff_t begin,
                            const Visible& visible, SumTile* sums) {
        for (std::ptrdiff_t i = 0; i < kTileKeys; ++i) {
            const __mmask16 seen = visible(begin + i);
            const std::uint8_t* head = head_at(piece.range, true, begin - piece.offset, i);
            if (!seen || !head) continue;
            const __m512 weight = _mm512_load_ps(weights[i / kTileRows * stride].rows[i % kTileRows]);
            for (std::ptrdiff_t d = 0; d < piece.range.head_dim; ++d) {
                const float value = piece.range.is_f32 ? f32_at(head, d) : bf16_at(head, d);
                if (std::fabs(value) <= kLargest) continue;
                float* row = sums[d / kTileRows * stride].rows[d % kTileRows];
                _mm512_store_ps(row, _mm512_mask3_fmadd_ps(weight, _mm512_set1_ps(value), _mm512_load_ps(row), seen));
            }
        }
    }

    static void attend(const AttentionPiece& piece, const AttentionScratch& scratch) {
        const KeyTiles tiles(piece.range);
        const std::ptrdiff_t heads = piece.heads, head_dim = piece.range.head_dim;
        Softmax softmax[kTileHeads];
        for (std::ptrdiff_t h = 0; h < heads; ++h) {
            const float* rows[kTileTokens];
            for (std::ptrdiff_t n = 0; n < piece.queries; ++n) rows[n] = piece.q + h * piece.q_head + n * piece.q_query;
            TileLayout::split(rows, piece.queries, head_dim, 0, tiles.head_blocks, scratch.queries + h * tiles.head_blocks);
            softmax[h] = {_mm512_set1_ps(piece.sinks[h]), _mm512_set1_ps(1.0f)};
        }
        std::memset(scratch.sums, 0, static_cast<std::size_t>(tiles.head_rows * heads) * sizeof(SumTile));
        std::int32_t first = piece.first[0], last = piece.last[0], last_first = first, first_last = last;
        for (std::ptrdiff_t n = 1; n < piece.queries; ++n) {
            first = std::min(first, piece.first[n]), last_first = std::max(last_first, piece.first[n]);
            last = std::max(last, piece.last[n]), first_last = std::min(first_last, piece.last[n]);
        }
        const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(static_cast<float>(head_dim)));
        P::begin();
        for (std::ptrdiff_t block = first / kTileKeys; block * kTileKeys < last; ++block) {
            const std::ptrdiff_t begin = block * kTileKeys;
            const WeightTile* at = piece.tiles + block * tiles.count();
            const Visible visible = {_mm512_loadu_si512(piece.first), _mm512_loadu_si512(piece.last)};
            const bool all = begin >= last_first && begin + kTileKeys <= first_last;
            for (std::ptrdiff_t r = 0; r < kTileKeys / kTileRows; r += 2) {
                multiply(tiles, {at + tiles.key(0, r), tiles.head_blocks, 2}, tiles.key(1, 0) - tiles.key(0, 0),
                         {scratch.queries, tiles.head_blocks, heads}, tiles.head_blocks, true, scratch.scores + r * heads);
            }
            for (std::ptrdiff_t h = 0; h < heads; ++h) {
                const auto weights = [&](auto seen) {
                    return weights_of(scratch.scores + h, heads, begin, seen, factor, softmax[h], scratch.weights + h * kKeyBlocks);
                };
                const __m512 scale = all ? weights(AllVisible{}) : weights(visible);
                if (_mm512_cmp_ps_mask(scale, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ)) {
                    for (std::ptrdiff_t d = 0; d < tiles.head_rows * kTileRows; ++d) {
                        float* row = scratch.sums[d / kTileRows * heads + h].rows[d % kTileRows];
                        _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), scale));
                    }
                }
                if (!piece.finite[block]) add_special(scratch.scores + h, heads, piece, begin, visible, scratch.sums + h);
            }
            for (std::ptrdiff_t d = 0; d < tiles.head_rows; d += 2) {
                const std::ptrdiff_t row_tiles = std::min<std::ptrdiff_t>(2, tiles.head_rows - d);
                multiply(tiles, {at + tiles.value(0, d), kKeyBlocks, row_tiles}, tiles.value(1, 0) - tiles.value(0, 0),
                         {scratch.weights, kKeyBlocks, heads}, kKeyBlocks, false, scratch.sums + d * heads);
            }
        }
        P::end();
        static constexpr float kNoBias[kTileRows] = {};
        for (std::ptrdiff_t h = 0; h < heads; ++h) {
            float factors[kTileTokens];
            _mm512_storeu_ps(factors, _mm512_div_ps(_mm512_set1_ps(1.0f), softmax[h].total));
            for (std::ptrdiff_t d = 0; d < tiles.head_rows; ++d) {
                float* out[kTileTokens];
                for (std::ptrdiff_t n = 0; n < piece.queries; ++n) {
                    out[n] = piece.out + h * piece.out_head + n * piece.out_query + d * kTileRows;
                }
                TileLayout::store(scratch.sums[d * heads + h], std::min(kTileRows, head_dim - d * kTileRows), piece.queries, kNoBias,
                                  factors, out);
            }
        }
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
