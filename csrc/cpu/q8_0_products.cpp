// Products with rows of Q8_0.
#include <algorithm>

#include "bits.hpp"
#include "engine.hpp"
#include "pool.hpp"
#include "scratch.hpp"

namespace moe_surgery::cpu {
namespace {

// Bytes of weights in a piece of work, roughly.
constexpr std::ptrdiff_t kPieceBytes = 96 << 10;
// Tokens that a thread multiplies with one piece of weights at a time, so that both stay in its cache.
constexpr std::ptrdiff_t kTokensAtOnce = 32;
// Rows of a piece: a multiple of a kernel's tile.
constexpr std::ptrdiff_t kRowsAtOnce = 6;

}  // namespace

void Engine::q8_0_products(const float* x, std::ptrdiff_t tokens, const std::vector<Product>& products) const {
    const std::ptrdiff_t columns = products.front().weight.columns, width = act_blocks_of(columns);
    const std::ptrdiff_t step = std::max<std::ptrdiff_t>(1, kPieceBytes / (kRowsAtOnce * q8_0_row_bytes(columns))) * kRowsAtOnce;
    std::vector<std::ptrdiff_t> ends;
    for (const Product& product : products) {
        ends.push_back((ends.empty() ? 0 : ends.back()) + (product.rows + step - 1) / step);
    }
    const Scratch<WordBlock512> word_blocks(tokens * width);
    std::vector<Words> rows;
    for (std::ptrdiff_t t = 0; t < tokens; ++t) rows.push_back(word_blocks.get() + t * width);

    const auto quantize = [&](std::ptrdiff_t t, int) {
        kernels_.quantize_words(x + t * columns, columns, word_blocks.get() + t * width);
    };
    const auto multiply = [&](std::ptrdiff_t piece, int) {
        const auto which = std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin();
        const Product& product = products[static_cast<std::size_t>(which)];
        const std::ptrdiff_t before = which ? ends[static_cast<std::size_t>(which - 1)] : 0;
        const std::ptrdiff_t first = (piece - before) * step, last = std::min(product.rows, first + step);
        for (std::ptrdiff_t t = 0; t < tokens; t += kTokensAtOnce) {
            kernels_.q8_0_rows(product.weight, first, last, rows.data() + t, std::min(kTokensAtOnce, tokens - t),
                               product.y + t * product.rows + first, product.rows);
        }
        for (std::ptrdiff_t t = 0; t < tokens; ++t) {
            add_values(product.bias, first, last, product.y + t * product.rows + first);
        }
    };
    Pool::shared().run(threads_, {{tokens, quantize}, {ends.back(), multiply}});
}

}  // namespace moe_surgery::cpu
