// Attention of long steps in tiles: keys and values become tiles once, for all queries.
#include <algorithm>
#include <vector>

#include "engine.hpp"
#include "pool.hpp"
#include "tiled.hpp"

namespace moe_surgery::cpu {

bool Engine::attention_in_tiles(const Attention& a, const VisibleKeys& visible) const {
    if (!tiles_ || !tiles_->attend) return false;
    const TileKernels& kernels = *tiles_;
    // Of each sequence, the first of its blocks of keys, and the number of its first key.
    std::vector<std::ptrdiff_t> blocks = {0}, offsets;
    for (std::ptrdiff_t b = 0; b < a.batch; ++b) {
        const VisibleKeys::Range keys = visible.sequences[static_cast<std::size_t>(b)];
        std::ptrdiff_t offset = 0;
        if (keys.count()) {
            const auto position_of = [&](std::ptrdiff_t i) {
                return a.key_positions[b * a.key_position_stride + visible.slots[static_cast<std::size_t>(i)]];
            };
            if (position_of(keys.last - 1) - position_of(keys.first) != keys.count() - 1) return false;
            offset = position_of(keys.first) % kTileKeys;
        }
        offsets.push_back(offset);
        blocks.push_back(blocks.back() + tiles_of(keys.count() + offset, kTileKeys));
    }
    const std::ptrdiff_t all_blocks = blocks.back(), group = a.heads / a.kv_heads;
    const KeyTiles layout(range_of(a, visible, 0, 0));
    const auto size = [](std::ptrdiff_t count) { return static_cast<std::size_t>(count); };
    const Scratch<WeightTile> tiles(a.kv_heads * all_blocks * layout.count());
    const Scratch<bool> finite(a.kv_heads * all_blocks);

    const auto load = [&](std::ptrdiff_t piece, int) {
        const std::ptrdiff_t kv_head = piece / all_blocks, block = piece % all_blocks;
        const std::ptrdiff_t b = std::upper_bound(blocks.begin(), blocks.end(), block) - blocks.begin() - 1;
        const std::ptrdiff_t first = (block - blocks[size(b)]) * kTileKeys - offsets[size(b)];
        finite[piece] = kernels.key_tiles(range_of(a, visible, b, kv_head), first, tiles.get() + piece * layout.count());
    };

    const std::ptrdiff_t heads = std::min(group, kTileHeads), parts = parts_of(group, heads);
    const std::ptrdiff_t query_tiles = tiles_of(a.queries, kTileTokens);
    const std::ptrdiff_t splits = heads * (layout.head_blocks + kKeyBlocks), sums = heads * (kTileKeys / kTileRows + layout.head_rows);
    const Scratch<SplitTile> split_scratch(splits * threads_);
    const Scratch<SumTile> sum_scratch(sums * threads_);
    const auto attend = [&](std::ptrdiff_t which, int thread) {
        const std::ptrdiff_t part = which % parts, tile = which / parts % query_tiles;
        const std::ptrdiff_t kv_head = which / (parts * query_tiles) % a.kv_heads, b = which / (parts * query_tiles * a.kv_heads);
        const std::ptrdiff_t head = kv_head * group + part * heads, query = tile * kTileTokens;
        AttentionPiece piece = {};
        piece.q = a.q + ((b * a.heads + head) * a.queries + query) * a.head_dim;
        piece.q_head = a.queries * a.head_dim;
        piece.q_query = a.head_dim;
        piece.out = a.out + ((b * a.queries + query) * a.heads + head) * a.head_dim;
        piece.out_head = a.head_dim;
        piece.out_query = a.heads * a.head_dim;
        piece.sinks = a.sinks + head;
        piece.heads = std::min(heads, group - part * heads);
        piece.queries = std::min(kTileTokens, a.queries - query);
        piece.range = range_of(a, visible, b, kv_head);
        piece.offset = offsets[size(b)];
        const std::ptrdiff_t shift = piece.offset - visible.sequences[size(b)].first;
        for (std::ptrdiff_t n = 0; n < piece.queries; ++n) {
            const VisibleKeys::Range& keys = visible.queries[size(b * a.queries + query + n)];
            piece.first[n] = static_cast<std::int32_t>(keys.first + shift);
            piece.last[n] = static_cast<std::int32_t>(keys.last + shift);
        }
        const std::ptrdiff_t at = kv_head * all_blocks + blocks[size(b)];
        piece.tiles = tiles.get() + at * layout.count();
        piece.finite = finite.get() + at;
        SplitTile* splits_at = split_scratch.get() + splits * thread;
        SumTile* sums_at = sum_scratch.get() + sums * thread;
        kernels.attend(piece, {splits_at, splits_at + heads * layout.head_blocks, sums_at, sums_at + heads * (kTileKeys / kTileRows)});
    };
    Pool::shared().run(threads_, {{a.kv_heads * all_blocks, load}, {a.batch * a.kv_heads * query_tiles * parts, attend}});
    return true;
}

}  // namespace moe_surgery::cpu
