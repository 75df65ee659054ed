#include "engine.hpp"

#include <algorithm>
#include <atomic>

#include "../isa/isa.hpp"
#include "bits.hpp"
#include "pool.hpp"

namespace moe_surgery::cpu {
namespace {

// Bytes of weights in a piece of work, roughly.
constexpr std::ptrdiff_t kPieceBytes = 96 << 10;
// Tokens that a thread multiplies with one piece of weights at a time, so that both stay in its cache.
constexpr std::ptrdiff_t kTokensAtOnce = 32;
// Rows of a piece at least in long steps, where each token's activations are read again for every piece.
constexpr std::ptrdiff_t kLongStepRows = 80;

#if defined(MOE_SURGERY_TILES)
// The kernels of AVX-512 VNNI, with tiles beside them.
Kernels with_tiles(const char* name, const TileKernels& tiles) {
    Kernels kernels = kAvx512VnniKernels;
    kernels.name = name;
    kernels.tiles = &tiles;
    return kernels;
}
#endif

std::vector<const Kernels*> find_kernels() {
    using isa::Isa;
    std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
#if defined(MOE_SURGERY_TILES)
    static const Kernels amx = with_tiles("amx", kAmxTiles), bf16 = with_tiles("avx512bf16", kAvx512Bf16Tiles);
    if (isa::supported(Isa::amx)) kernels.push_back(&amx);
#endif
    if (isa::supported(Isa::avx512vnni)) kernels.push_back(&kAvx512VnniKernels);
#if defined(MOE_SURGERY_TILES)
    // After VNNI, whose products of integers take half the instructions.
    if (isa::supported(Isa::avx512bf16)) kernels.push_back(&bf16);
#endif
    if (isa::supported(Isa::avx512)) kernels.push_back(&kAvx512Kernels);
    if (isa::supported(Isa::avx2)) kernels.push_back(&kAvx2Kernels);
#elif defined(__aarch64__)
    if (isa::supported(Isa::neon)) kernels.push_back(&kNeonKernels);
#endif
    kernels.push_back(&kScalarKernels);
    return kernels;
}

std::ptrdiff_t pieces_of(std::ptrdiff_t rows, std::ptrdiff_t step) { return (rows + step - 1) / step; }

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
    static const std::vector<const Kernels*> kernels = find_kernels();
    return kernels;
}

const Kernels& select_kernels(const std::string& name) { return isa::select(available_kernels(), name); }

void Engine::products(const float* x, std::ptrdiff_t tokens, const std::vector<Product>& products) const {
    std::vector<Product> tiled, q8_0, by_rows;
    for (const Product& product : products) {
        const Dtype dtype = product.weight.dtype;
        const bool has_tiles = dtype == Dtype::bf16 || dtype == Dtype::q8_0;
        (tiles_ && has_tiles ? tiled : dtype == Dtype::q8_0 ? q8_0 : by_rows).push_back(product);
    }
    if (tokens && !tiled.empty()) tiled_products(x, tokens, tiled);
    if (tokens && !q8_0.empty()) q8_0_products(x, tokens, q8_0);
    if (tokens && !by_rows.empty()) row_products(x, tokens, by_rows);
}

void Engine::row_products(const float* x, std::ptrdiff_t tokens, const std::vector<Product>& products) const {
    const std::ptrdiff_t columns = products.front().weight.columns, width = groups_of(columns) * kGroup;
    // Rows of a piece: a multiple of a kernel's tile.
    std::ptrdiff_t bytes = 1;
    for (const Product& product : products) bytes = std::max(bytes, bytes_of(product.weight.dtype) * columns);
    std::ptrdiff_t step = std::max<std::ptrdiff_t>(1, kPieceBytes / (10 * bytes)) * 10;
    if (tokens >= kTokensAtOnce) step = std::max(step, kLongStepRows);
    std::vector<std::ptrdiff_t> ends;
    for (const Product& product : products) {
        ends.push_back((ends.empty() ? 0 : ends.back()) + pieces_of(product.rows, step));
    }
    // Where rows make few pieces, tokens are cut too.
    const std::ptrdiff_t chunks = pieces_of(tokens, kTokensAtOnce);
    const std::ptrdiff_t token_parts = std::min(chunks, pieces_of(4 * threads_, ends.back()));
    std::vector<float> deinterleave(static_cast<std::size_t>(tokens * width));
    std::vector<Deinterleaved> rows(static_cast<std::size_t>(tokens));
    for (std::ptrdiff_t t = 0; t < tokens; ++t) rows[static_cast<std::size_t>(t)] = deinterleave.data() + t * width;

    const auto deinterleave_token = [&](std::ptrdiff_t t, int) {
        kernels_.deinterleave(x + t * columns, columns, deinterleave.data() + t * width);
    };
    const auto multiply = [&](std::ptrdiff_t piece, int) {
        const std::ptrdiff_t part = piece % token_parts;
        piece /= token_parts;
        const auto which = std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin();
        const Product& product = products[static_cast<std::size_t>(which)];
        const std::ptrdiff_t before = which ? ends[static_cast<std::size_t>(which - 1)] : 0;
        const std::ptrdiff_t first = (piece - before) * step, last = std::min(product.rows, first + step);
        const std::ptrdiff_t end = std::min(tokens, chunks * (part + 1) / token_parts * kTokensAtOnce);
        for (std::ptrdiff_t t = chunks * part / token_parts * kTokensAtOnce; t < end; t += kTokensAtOnce) {
            const std::ptrdiff_t count = std::min(kTokensAtOnce, end - t);
            float* y = product.y + t * product.rows + first;
            kernels_.dense_rows(product.weight, first, last, rows.data() + t, count, y, product.rows);
            for (std::ptrdiff_t i = 0; i < count; ++i) add_values(product.bias, first, last, y + i * product.rows);
        }
    };
    Pool::shared().run(threads_, {{tokens, deinterleave_token}, {ends.back() * token_parts, multiply}});
}

void Engine::rms_norm(const float* x, std::ptrdiff_t tokens, std::ptrdiff_t columns, const Values& weight,
                      float eps, float* y) const {
    const auto one = [&](std::ptrdiff_t t, int) {
        kernels_.rms_norm(x + t * columns, weight, columns, eps, y + t * columns);
    };
    const int threads = tokens * columns < 1 << 16 ? 1 : threads_;  // else waking threads takes longer
    Pool::shared().run(threads, {{tokens, one}});
}

void topk_softmax(const float* logits, std::ptrdiff_t tokens, std::ptrdiff_t experts, std::ptrdiff_t top_k,
            std::int64_t* ids, float* weights) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(experts));
    for (std::ptrdiff_t t = 0; t < tokens; ++t, logits += experts, ids += top_k, weights += top_k) {
        for (std::ptrdiff_t e = 0; e < experts; ++e) order[static_cast<std::size_t>(e)] = e;
        std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](std::int64_t a, std::int64_t b) {
            // NaN comes first, as in torch's descending sort.
            const bool a_none = logits[a] != logits[a], b_none = logits[b] != logits[b];
            if (a_none != b_none) return a_none;
            return logits[a] > logits[b] || (!(logits[a] < logits[b]) && a < b);
        });
        float total = 0.0f;
        for (std::ptrdiff_t i = 0; i < top_k; ++i) {
            ids[i] = order[static_cast<std::size_t>(i)];
            weights[i] = __builtin_expf(logits[ids[i]] - logits[ids[0]]);
            total += weights[i];
        }
        for (std::ptrdiff_t i = 0; i < top_k; ++i) weights[i] /= total;
    }
}

void rope_cos_sin(const std::int64_t* positions, std::ptrdiff_t count, const float* frequencies, std::ptrdiff_t width,
           float scale, float* cos, float* sin) {
    for (std::ptrdiff_t i = 0; i < count; ++i) {
        for (std::ptrdiff_t j = 0; j < width; ++j) {
            const double angle = static_cast<float>(positions[i]) * frequencies[j];
            *cos++ = static_cast<float>(__builtin_cos(angle)) * scale;
            *sin++ = static_cast<float>(__builtin_sin(angle)) * scale;
        }
    }
}

void apply_rope(const RopeArgs& r) {
    const std::ptrdiff_t half = r.head_dim / 2;
    float* y = r.y;
    for (std::ptrdiff_t i = 0; i < r.sizes[0]; ++i) {
        for (std::ptrdiff_t j = 0; j < r.sizes[1]; ++j) {
            for (std::ptrdiff_t k = 0; k < r.sizes[2]; ++k, y += r.head_dim) {
                const auto at = [&](const std::ptrdiff_t* strides) { return i * strides[0] + j * strides[1] + k * strides[2]; };
                const float* x = r.x + at(r.x_strides);
                const float *cos = r.cos + at(r.cos_strides), *sin = r.sin + at(r.sin_strides);
                for (std::ptrdiff_t d = 0; d < half; ++d) {
                    y[d] = x[d] * cos[d] - x[half + d] * sin[d];
                    y[half + d] = x[half + d] * cos[d] + x[d] * sin[d];
                }
            }
        }
    }
}

std::uint64_t read_bytes(const std::uint8_t* from, std::ptrdiff_t bytes, int threads) {
    using Words = std::uint64_t __attribute__((vector_size(16)));
    constexpr std::ptrdiff_t kSize = 1 << 20;
    std::atomic<std::uint64_t> total{0};
    const auto read = [&](std::ptrdiff_t piece, int) {
        Words a = {}, b = {}, c = {}, d = {};
        const auto at = [](const std::uint8_t* p) {
            Words words;
            __builtin_memcpy(&words, p, sizeof words);
            return words;
        };
        for (const std::uint8_t* p = from + piece * kSize; p < from + (piece + 1) * kSize; p += 64) {
            a += at(p);
            b += at(p + 16);
            c += at(p + 32);
            d += at(p + 48);
        }
        a += b + c + d;
        total += a[0] + a[1];
    };
    Pool::shared().run(threads, {{bytes / kSize, read}});
    return total;
}

}  // namespace moe_surgery::cpu
