// The search of scale_search.hpp over a tile of V::kBytes blocks; included by vector_kernels.inl.
#include "scale_search.hpp"

namespace moe_surgery::mxfp4 {
namespace {

// Sums by column. Units of 2^-11: `first_gain` has those around 1/4, 4 * `second_gain` those around 3/4
// and 64 * `loss` those from 3.5. No sum exceeds 16 bits.
template <class V>
struct ScaleSums {
    typename V::Vec first_gain;
    typename V::Vec second_gain;
    typename V::Vec loss;
};

// After `base` is subtracted from the bits of a magnitude, the exponent field 4 + e means z = 2^e. Between
// powers of two bits are linear in z: 1/8 is 0x080, 1/4 0x100, 3/8 0x140, 5/8 0x1a0, 3/4 0x1c0, 7/8 0x1e0,
// 3.5 0x2e0 and 4 0x300.
template <class V>
inline void add_to_scale_sums(ScaleSums<V>& sums, typename V::Vec words, typename V::Vec base) {
    const auto z = V::subtract_saturating_u16(V::bit_and(words, V::broadcast16(0x7fff)), base);
    const auto to_three_eighths = V::subtract_saturating_u16(V::broadcast16(0x140), z);
    sums.first_gain = V::add16(sums.first_gain,
                               V::min_u16(V::subtract_saturating_u16(z, V::broadcast16(0x080)),
                                          V::add16(to_three_eighths, to_three_eighths)));
    sums.second_gain = V::add16(sums.second_gain,
                                V::min_u16(V::subtract_saturating_u16(z, V::broadcast16(0x1a0)),
                                           V::subtract_saturating_u16(V::broadcast16(0x1e0), z)));
    sums.loss = V::add16(sums.loss, V::add16(V::subtract_saturating_u16(z, V::broadcast16(0x2e0)),
                                             V::subtract_saturating_u16(z, V::broadcast16(0x300))));
}

template <class V>
struct TileSearch {
    alignas(64) std::uint16_t bases[V::kBytes];
    alignas(64) std::uint16_t first_gains[V::kBytes];
    alignas(64) std::uint16_t second_gains[V::kBytes];
    alignas(64) std::uint16_t losses[V::kBytes];
    std::uint16_t coarse[V::kBytes];
    std::uint16_t open[V::kBytes];
};

// Replace the first scales of a tile's blocks by the best ones; false when all stay. Each block's values
// are zeros, or its first scale is at least 4 and at most kLargestScale.
template <class V>
inline bool improve_scales(const std::uint8_t* from, std::ptrdiff_t stride, const std::uint16_t* maxima,
                           std::uint16_t* scales) {
    TileSearch<V> tile;
    unsigned any_open = 0;
    for (int i = 0; i < V::kBytes; ++i) {
        const unsigned fraction = maxima[i] & 0x7f;
        const unsigned above = (fraction > kFractionOfSeven) & (scales[i] != kLargestScale);
        const unsigned below = (fraction < kFractionOfNoGain) & (maxima[i] != 0);
        const unsigned coarse = scales[i] + above;
        tile.coarse[i] = static_cast<std::uint16_t>(coarse);
        tile.bases[i] = static_cast<std::uint16_t>((coarse - 4) << 7);
        tile.open[i] = static_cast<std::uint16_t>(above | below);
        any_open |= above | below;
    }
    if (!any_open) return false;

    const auto* bases = reinterpret_cast<const std::uint8_t*>(tile.bases);
    const auto first_base = V::load(bases);
    const auto second_base = V::load(bases + V::kBytes);
    ScaleSums<V> first = {V::zero(), V::zero(), V::zero()};
    ScaleSums<V> second = first;
    for (int row = 0; row < kBlockValues; ++row, from += stride) {
        add_to_scale_sums<V>(first, V::load(from), first_base);
        add_to_scale_sums<V>(second, V::load(from + V::kBytes), second_base);
    }
    store_words<V>(reinterpret_cast<std::uint8_t*>(tile.first_gains), {first.first_gain, second.first_gain});
    store_words<V>(reinterpret_cast<std::uint8_t*>(tile.second_gains), {first.second_gain, second.second_gain});
    store_words<V>(reinterpret_cast<std::uint8_t*>(tile.losses), {first.loss, second.loss});

    unsigned changed = 0;
    for (int i = 0; i < V::kBytes; ++i) {
        const unsigned gain = tile.first_gains[i] + 4u * tile.second_gains[i];
        const unsigned finer = tile.open[i] & static_cast<unsigned>(64u * tile.losses[i] < gain);
        const unsigned scale = tile.coarse[i] - finer;
        changed |= scale ^ scales[i];
        scales[i] = static_cast<std::uint16_t>(scale);
    }
    return changed != 0;
}

}  // namespace
}  // namespace moe_surgery::mxfp4
