// Which of three neighbouring scales gives a block the least squared error.
//
// The first scale puts the largest value m of the block at 4 <= m < 8 (in units of the scale). Only two
// scales are ever left to compare, a coarse one and the next finer one, half as large. Let z be
// magnitudes in units of the coarse scale. Rounded to nearest under the fine one, a value's squared
// error is that under the coarse one
//
//     less 1/16 - |z - 1/4| / 2   within 1/8 of 1/4, where the fine scale has one more code,
//     less 1/16 - |z - 3/4| / 2   within 1/8 of 3/4, likewise,
//     plus 2z - 7                 from 3.5 to 5, where the fine scale ends at 3,
//
// and the same elsewhere below 3.5. All are continuous, so ties in rounding do not matter, and with
// BF16's 8 bits all are multiples of 2^-11: integers compare them exactly, in any order. The fine scale
// wins if the gains exceed the loss; with equal sums the coarse one has the lower error of m.
//
//     m > 7:        the first scale is the fine one (z > 3.5), if the coarse one is finite throughout.
//     m <= 7:       the scale above cannot be better: its codes up to 6 are some of the first scale's, and
//                   its next one, 8, is not nearer than 6.
//     m < 4.46875:  the first scale is the coarse one. From there on the loss of m alone, 2m - 7 or more, is
//                   at least 31/16, and 31 other values gain 1/16 each at most.
#pragma once

namespace moe_surgery::mxfp4 {

// By the 7 bits of the largest value's fraction: above 7, and below 4.46875.
constexpr unsigned kFractionOfSeven = 0x60;
constexpr unsigned kFractionOfNoGain = 0x0f;
// Under the scale above this one, some codes are infinite.
constexpr unsigned kLargestScale = 252;

}  // namespace moe_surgery::mxfp4
