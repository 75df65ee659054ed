// Exact code for single blocks, which the vector kernels use for tails and rare scales.
#pragma once

#include "mxfp4.hpp"

namespace moe_surgery::mxfp4 {

// Decode one block, under any scale, into 32 consecutive values.
void decode_block_exactly(const std::uint8_t* block, unsigned scale, std::uint8_t* to);

// Decode block `block` of rows [first, first + count) into its 32 rows of the transposed matrix.
void decode_transposed_rows(const PackedView& in, const MatrixSink& out, std::ptrdiff_t block,
                            std::ptrdiff_t first, std::ptrdiff_t count);

// Encode rows [first, first + count) of block `block` of the transposed layout, adding to `report`.
void encode_transposed_rows(const MatrixView& in, const PackedSink& out, std::ptrdiff_t block,
                            std::ptrdiff_t first, std::ptrdiff_t count, EncodeReport& report);

}  // namespace moe_surgery::mxfp4
