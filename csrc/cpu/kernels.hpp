// Products with weights as a checkpoint stores them: the interface of the instruction sets.
//
// Activations are float32, those of MXFP4 and Q8_0 products rounded to 16-bit integers (see ActBlock512 and
// WordBlock512). A product's value is the sum of 16 partial sums ("lanes"), each added up in the order of the columns, then combined in a
// fixed tree; which lane a column belongs to is part of the format below. So a value depends only on its row and
// its activations: not on the tile, the other tokens of a call, the threads or the instruction set.
//
// Weights may be at any address, and strides count bytes: they are windows into mapped files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_surgery::cpu {

constexpr std::ptrdiff_t kLanes = 16;
constexpr std::ptrdiff_t kGroup = 32;        // dense columns that are multiplied at a time
constexpr std::ptrdiff_t kBlock = 32;        // MXFP4 values under one scale
constexpr std::ptrdiff_t kBlockBytes = 16;   // their codes
constexpr std::ptrdiff_t kActBlock = kLanes * kBlock;            // MXFP4 columns that are multiplied at a time:
constexpr std::ptrdiff_t kActBlockBytes = kLanes * kBlockBytes;  // a block in each lane

constexpr std::ptrdiff_t groups_of(std::ptrdiff_t columns) { return (columns + kGroup - 1) / kGroup; }
constexpr std::ptrdiff_t act_blocks_of(std::ptrdiff_t columns) { return (columns + kActBlock - 1) / kActBlock; }

// The MXFP4 block of an ActBlock512 in a lane: the order that results from transposing 4 x 4 words.
constexpr std::ptrdiff_t block_of(std::ptrdiff_t lane) { return lane % 4 * 4 + lane / 4; }

// The dtype of dense weights. BF16, F16 and F32 convert to float32 exactly, so the same values in another dtype
// give the same bits. Q8_0 is for rows of products alone (see q8_0_rows).
enum class Dtype : std::uint8_t { bf16, f16, f32, q8_0 };

constexpr std::ptrdiff_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// A bias, a norm's weight or attention's sinks.
struct Values {
    const std::uint8_t* data;  // null for no bias
    Dtype dtype;
};

// Rows of dense values: row r is `columns` values from data + r * stride.
struct DenseRows {
    const std::uint8_t* data;
    std::ptrdiff_t stride;
    std::ptrdiff_t columns;
    Dtype dtype;
};

// Rows of MXFP4: row r has columns / 32 blocks from blocks + r * block_stride, and as many scales.
struct Mxfp4Rows {
    const std::uint8_t* blocks;
    std::ptrdiff_t block_stride;
    const std::uint8_t* scales;
    std::ptrdiff_t scale_stride;
    std::ptrdiff_t columns;
};

// Activations for DenseRows: for each 32 columns the even ones, then the odd ones;
// zeros after the last column. `groups_of(columns)` times 32 floats a token.
using Deinterleaved = const float*;

// Activations for Mxfp4Rows. A row's 512 columns are 16 blocks of 32; lane i works on block block_of(i), so that
// one load of 16 words takes four bytes (eight codes) of every block:
//
//   weights of a row   block 0        block 1        ...   block 15          16 bytes of codes each
//   word k (4 bytes)   columns 8k ..  8k + 7 of its block, low nibbles even columns, high nibbles odd ones
//   vector 2k          lane i: columns 8k, + 2, + 4, + 6 of block_of(i)      times the low nibbles of word k
//   vector 2k + 1      lane i: columns 8k + 1, + 3, + 5, + 7                 times the high nibbles
//
// 512 columns, zeros after the last: integers of 16 bits (the largest
// magnitude of a block is kQuantMax) as two signed bytes each, 256 high + low.
struct alignas(64) ActBlock512 {
    // Lane i of vector 2k + n: columns 8k + n, 8k + n + 2, + 4 and + 6 of block_of(i), whose weights are the
    // low (n = 0) or high nibbles of bytes 4k to 4k + 3.
    std::int8_t high[8][4 * kLanes];
    std::int8_t low[8][4 * kLanes];
    // Of each lane: -12 times the sum of its integers, for instruction sets that add 12 to weights to make them
    // unsigned.
    std::int32_t starts[kLanes];
    // Of each lane: the factor of a product of an integer and a doubled weight, before the weight's scale.
    float factors[kLanes];
};
constexpr float kQuantMax = 32639.0f;  // 256 * 127 + 127
using Quantized = const ActBlock512*;

// Activations for rows of Q8_0: 512 columns, zeros after the last, as integers of 16 bits (the largest magnitude of
// a block of 32 is kQuantMax). Lane i works on block i.
struct alignas(64) WordBlock512 {
    std::int16_t words[kBlock / 2][2 * kLanes];  // lane i of vector k: columns 2k and 2k + 1 of block i
    float factors[kLanes];                       // of each lane: a unit's value
};
using Words = const WordBlock512*;

// Bytes of a row of Q8_0 in memory: see q8_0_rows.
constexpr std::ptrdiff_t q8_0_row_bytes(std::ptrdiff_t columns) {
    return (columns + columns / kBlock * 2 + 63) / 64 * 64;
}

// Query heads that read a key-value head's keys together.
constexpr int kHeadsAtOnce = 4;

// Floats of scratch that they need: one per head and key, rounded up to a vector.
constexpr std::ptrdiff_t attention_scratch(std::ptrdiff_t keys) {
    return kHeadsAtOnce * ((keys + kLanes - 1) / kLanes * kLanes);
}

// The keys and values that query heads attend to in one key-value head. Key i of `count`, in order of position,
// is at keys + slots[i] * key_stride (bytes).
struct KeyRange {
    const std::uint8_t* keys;
    const std::uint8_t* values;
    std::ptrdiff_t key_stride;
    std::ptrdiff_t value_stride;
    const std::int32_t* slots;
    std::ptrdiff_t count;
    std::ptrdiff_t head_dim;
    bool is_f32;  // float32 keys and values, else BF16
};

// Long steps: some queries with the keys of a KeyRange, which are transposed once for all queries. In blocks of
// kKeysAtOnce, value d of key i is transposed[(i / kKeysAtOnce * head_dim + d) * kKeysAtOnce + i % kKeysAtOnce].
constexpr std::ptrdiff_t kKeysAtOnce = 64;
constexpr std::ptrdiff_t kQueriesAtOnce = 4;
constexpr std::ptrdiff_t kMostHeads = 64;  // of a tile
struct QueryTile {
    std::ptrdiff_t queries;
    const float* q[kQueriesAtOnce];  // heads from q_stride to q_stride
    float* out[kQueriesAtOnce];      // [heads, head_dim]
    std::ptrdiff_t first[kQueriesAtOnce], last[kQueriesAtOnce];  // the keys that each attends to
};
// Scores of a head: those of a tile's keys from a whole block on, and what softmax writes after the last.
constexpr std::ptrdiff_t tile_scores(std::ptrdiff_t keys) { return (keys / kKeysAtOnce + 3) * kKeysAtOnce; }

struct TileKernels;  // see tiles.hpp

// The kernels of one instruction set; all sets give the same bits, but for `tiles`.
struct Kernels {
    const char* name;

    // x[columns] to the activations of DenseRows and Mxfp4Rows.
    void (*deinterleave)(const float* x, std::ptrdiff_t columns, float* out);
    void (*quantize)(const float* x, std::ptrdiff_t columns, ActBlock512* act_blocks);
    void (*quantize_words)(const float* x, std::ptrdiff_t columns, WordBlock512* word_blocks);

    // y[t * y_stride + r - first] = row r times token t, for rows first <= r < last.
    void (*dense_rows)(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last, const Deinterleaved* x,
                       std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride);
    void (*mxfp4_rows)(const Mxfp4Rows& weight, std::ptrdiff_t first, std::ptrdiff_t last,
                       const Quantized* x, std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride);

    // The same for rows of Q8_0, whose columns are a multiple of 32: value = code * scale of its block. A row is
    // q8_0_row_bytes(columns) bytes, 512 columns (n = 16 blocks) at a time, the rest (n < 16 blocks) last: byte
    // 2 (n k + i) + c is the code of column 2k + c of block i, for k < 16, i < n and c < 2. After all codes
    // follow the scales as F16, in the order of the blocks, and padding.
    void (*q8_0_rows)(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last, const Words* x,
                      std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride);

    // The same for a weight stored transposed: column c is the values from data + c * stride, one a
    // row. Each value is one sum over the columns in their order. x holds plain activations.
    void (*dense_transposed)(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last,
                             const float* const* x, std::ptrdiff_t tokens, float* y,
                             std::ptrdiff_t y_stride);

    // z[i] from gate h[2i] and up h[2i + 1]: (up + 1) gate sigmoid(alpha gate), gate <= limit, |up| <= limit.
    void (*swiglu)(const float* h, std::ptrdiff_t intermediate, float limit, float alpha, float* z);

    // y = x / sqrt(mean(x^2) + eps) * weight.
    void (*rms_norm)(const float* x, const Values& weight, std::ptrdiff_t columns, float eps, float* y);

    // The norm of a row, in double precision, and its least and largest value.
    double (*measure)(const float* row, std::ptrdiff_t columns, float* least, float* largest);
    // y += weight * row, or = where `first`.
    void (*add_weighted)(const float* row, std::ptrdiff_t columns, float weight, bool first, float* y);
    // sums += row.
    void (*add_to_doubles)(const float* row, std::ptrdiff_t columns, double* sums);

    // out[h * head_dim] for `heads` query heads from q + h * q_stride: softmax over the range's keys and the
    // head's sink, times the range's values. `scores` is scratch of attention_scratch(range.count) floats.
    void (*attention)(const float* q, std::ptrdiff_t q_stride, const float* sinks, std::ptrdiff_t heads,
                   const KeyRange& range, float* scores, float* out);

    // Attention of long steps. Scores are one sum over the values of a head in their order, the rest is as above: the
    // bits do not depend on the tile. `count` keys of a block, zeros after them; and `heads` query heads of a tile with
    // `range`, over scratch of kQueriesAtOnce * heads * tile_scores(keys from the first to the last of the tile) floats.
    void (*transpose_keys)(const KeyRange& range, std::ptrdiff_t first, std::ptrdiff_t count, float* out);
    void (*attention_tile)(const QueryTile& tile, std::ptrdiff_t q_stride, const float* sinks, std::ptrdiff_t heads,
                           const KeyRange& range, const float* transposed, float* scratch);

    // Products of many tokens, or null for a set that has no faster form of them.
    const TileKernels* tiles;
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace moe_surgery::cpu
