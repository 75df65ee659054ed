// MXFP4 <-> BF16: the interface of the native core, independent of Python.
//
// A block is 32 values: 16 bytes, value 2j in the low nibble of byte j and 2j+1 in the high one, and
// a scale byte s, the factor 2^(s-127). BF16 values are handled as their 16 bits. All pointers may
// be unaligned, and all strides count bytes: arrays are often windows into a mapped file.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_surgery::mxfp4 {

constexpr std::ptrdiff_t kBlockValues = 32;
constexpr std::ptrdiff_t kBlockBytes = 16;

// MXFP4 to read: blocks u8[rows, groups, 16] and scales u8[rows, groups], inner axes contiguous.
struct PackedView {
    const std::uint8_t* blocks;
    std::ptrdiff_t block_stride;
    const std::uint8_t* scales;
    std::ptrdiff_t scale_stride;
    std::ptrdiff_t rows;
    std::ptrdiff_t groups;
};

// MXFP4 to write, laid out like PackedView.
struct PackedSink {
    std::uint8_t* blocks;
    std::ptrdiff_t block_stride;
    std::uint8_t* scales;
    std::ptrdiff_t scale_stride;
    std::ptrdiff_t rows;
    std::ptrdiff_t groups;
};

// A BF16 matrix, rows contiguous.
struct MatrixView {
    const std::uint8_t* data;
    std::ptrdiff_t stride;
};

struct MatrixSink {
    std::uint8_t* data;
    std::ptrdiff_t stride;
};

// What an encoding lost. bad_row and bad_block name the first block (lowest row, then lowest block)
// that MXFP4 cannot hold, because of a NaN or an infinity; they are -1 when there is none.
struct EncodeReport {
    std::int64_t inexact_blocks = 0;
    double error_sq = 0.0;
    double norm_sq = 0.0;
    std::ptrdiff_t bad_row = -1;
    std::ptrdiff_t bad_block = -1;
};

// One implementation of every operation; all of them give the same bits.
struct Kernels {
    const char* name;
    // out [rows, 32 * groups]: out[r, 32 b + j] is value j of block b of row r.
    void (*decode)(const PackedView& in, const MatrixSink& out);
    // out [32 * groups, rows]: the transpose of what `decode` writes.
    void (*decode_transposed)(const PackedView& in, const MatrixSink& out);
    // in [32 * out.groups, out.rows]: block b of row r is in[32 b .. 32 b + 31, r].
    EncodeReport (*encode_transposed)(const MatrixView& in, const PackedSink& out);
};

}  // namespace moe_surgery::mxfp4
