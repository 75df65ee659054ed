// Experts of MXFP4 in integers. Activations are kept as floats between the products, since an integer's factor is that of
// 512 columns.
#include "expert_form.hpp"
#include "integer_tiles.hpp"

namespace moe_surgery::cpu {
namespace {

// The tokens of a wave's tiles, by tile and segment.
struct Tokens {
    Tokens(std::ptrdiff_t columns, std::ptrdiff_t most_tiles)
        : segments(columns), tiles(most_tiles * segments.tiles), factors(most_tiles * segments.count * kTileTokens) {}

    void quantize(const IntegerKernels& kernels, const float* columns, std::ptrdiff_t tile, std::ptrdiff_t segment) const {
        kernels.quantize(columns, segments.last_column(segment) - segments.first_column(segment),
                         tiles.get() + tile * segments.tiles + segments.first(segment),
                         factors.get() + (tile * segments.count + segment) * kTileTokens);
    }
    QuadPanel panel(const Chunk& chunk, std::ptrdiff_t segment) const {
        return {tiles.get() + chunk.first * segments.tiles + segments.first(segment), segments.tiles,
                factors.get() + (chunk.first * segments.count + segment) * kTileTokens, segments.count * kTileTokens, chunk.tiles()};
    }

    const Segments segments;
    const Scratch<SplitQuads> tiles;
    const Scratch<float> factors;
};

// A panel of weights in a segment: rows `row` to `last`, at most 32.
struct Codes {
    CodeTile tiles[2 * kSegmentTiles];
    float factors[kPanelRows];
    std::uint64_t bands;

    void load(const IntegerKernels& kernels, const Mxfp4Rows& rows, const Segments& segments, std::ptrdiff_t segment,
              std::ptrdiff_t row, std::ptrdiff_t last, int band, std::ptrdiff_t i) {
        CodeTile* tile = tiles + i / kTileRows * kSegmentTiles;
        if (row + i < last) {
            const std::ptrdiff_t end = std::min(rows.columns / kBlock, segments.first(segment + 1) * 2);
            bands |= kernels.codes(rows, row + i, segments.first(segment) * 2, end, band, i % kTileRows, tile, factors + i);
        } else {
            for (std::ptrdiff_t t = 0; t < segments.width(segment); ++t) std::fill_n(tile[t].rows[i % kTileRows], kIntegerColumns, std::int8_t{0});
            factors[i] = 0.0f;
        }
    }
};

class IntegerExperts final : public ExpertForm {
  public:
    explicit IntegerExperts(const TiledExperts& experts)
        : experts_(experts), kernels_(*experts.kernels.integers), inputs_(experts.columns(), experts.most_tiles),
          activations_(experts.intermediate(), experts.most_tiles),
          floats_(experts.most_tiles * padded() * kTileTokens), columns_(experts.threads * kSegmentColumns * kTileTokens),
          codes_(experts.threads * kPanels) {}

    void split_inputs(const Chunk& chunk, std::ptrdiff_t part, std::ptrdiff_t parts, int thread) const override {
        float* columns = columns_.get() + thread * kSegmentColumns * kTileTokens;
        for_segments(inputs_.segments, part, parts, [&](std::ptrdiff_t segment) {
            for (std::ptrdiff_t tile = chunk.first; tile < chunk.last; ++tile) {
                const float* rows[kTileTokens];
                const std::ptrdiff_t count = experts_.inputs(chunk, tile, rows);
                kernels_.columns(rows, count, inputs_.segments.first_column(segment), inputs_.segments.last_column(segment), columns);
                inputs_.quantize(kernels_, columns, tile, segment);
            }
        });
    }

    void multiply_gate_up(const Chunk& chunk, std::ptrdiff_t first, std::ptrdiff_t last, int thread, SumTile* sums) const override {
        multiply(experts_.layer.gate_up, chunk, inputs_, first, last, thread, sums);
    }

    void activate(std::ptrdiff_t tile, std::ptrdiff_t row, std::ptrdiff_t rows, const SumTile* sums, const float* bias) const override {
        kernels_.swiglu(sums, kTokenTilesAtOnce, rows, bias, {experts_.layer.limit, experts_.layer.alpha},
                        floats_.get() + (tile * padded() + row / 2) * kTileTokens);
    }

    void split_activations(const Chunk& chunk, std::ptrdiff_t part, std::ptrdiff_t parts, int) const override {
        for_segments(activations_.segments, part, parts, [&](std::ptrdiff_t segment) {
            for (std::ptrdiff_t tile = chunk.first; tile < chunk.last; ++tile) {
                const std::ptrdiff_t column = activations_.segments.first_column(segment);
                activations_.quantize(kernels_, floats_.get() + (tile * padded() + column) * kTileTokens, tile, segment);
            }
        });
    }

    void multiply_down(const Chunk& chunk, std::ptrdiff_t first, std::ptrdiff_t last, int thread, SumTile* sums) const override {
        multiply(experts_.layer.down, chunk, activations_, first, last, thread, sums);
    }

  private:
    // Two that alternate, and one for further bands.
    static constexpr std::ptrdiff_t kPanels = 3;

    std::ptrdiff_t padded() const { return tiles_of(experts_.intermediate(), kTileColumns) * kTileColumns; }

    template <class Work>
    static void for_segments(const Segments& segments, std::ptrdiff_t part, std::ptrdiff_t parts, Work work) {
        for (std::ptrdiff_t i = segments.count * part / parts; i < segments.count * (part + 1) / parts; ++i) work(i);
    }

    // Panels in order: all rows in a segment, then in the next one. While one is multiplied the next one is loaded.
    void multiply(const ExpertMatrix& matrix, const Chunk& chunk, const Tokens& tokens, std::ptrdiff_t first, std::ptrdiff_t last,
                  int thread, SumTile* sums) const {
        struct Next {
            const IntegerKernels* kernels;
            const Mxfp4Rows* rows;
            const Segments* segments;
            std::ptrdiff_t segment, row, last;
            Codes* codes;

            std::ptrdiff_t row_tiles() const { return std::min<std::ptrdiff_t>(2, tiles_of(last - row, kTileRows)); }
            std::ptrdiff_t count() const { return row_tiles() * kTileRows; }
            void load(std::ptrdiff_t i, int band, Codes& into) const { into.load(*kernels, *rows, *segments, segment, row, last, band, i); }
        };
        const Segments& segments = tokens.segments;
        const Mxfp4Rows rows = mxfp4_of(matrix, chunk.stored_expert);
        const std::ptrdiff_t panels = parts_of(last - first, kPanelRows), steps = panels * segments.count;
        Codes* all = codes_.get() + thread * kPanels;
        const auto panel_of = [&](std::ptrdiff_t step) {
            const Next next = {&kernels_, &rows, &segments, step / panels, first + step % panels * kPanelRows, last, all + step % 2};
            next.codes->bands = 0;
            return next;
        };
        Next panel = panel_of(0);
        for (std::ptrdiff_t i = 0; i < panel.count(); ++i) panel.load(i, 0, *panel.codes);
        experts_.kernels.begin();
        for (std::ptrdiff_t step = 0; step < steps; ++step) {
            const bool more = step + 1 < steps;
            const Next next = more ? panel_of(step + 1) : panel;
            const auto load_next = [](const void* context, std::ptrdiff_t i) {
                const Next& ahead = *static_cast<const Next*>(context);
                ahead.load(i, 0, *ahead.codes);
            };
            const QuadPanel quads = tokens.panel(chunk, panel.segment);
            SumTile* to = sums + (panel.row - first) / kTileRows * kTokenTilesAtOnce;
            const auto add = [&](const Codes& codes, bool is_first, const Meanwhile& meanwhile) {
                kernels_.multiply({codes.tiles, codes.factors, panel.row_tiles()}, quads, segments.width(panel.segment), is_first, to,
                                  kTokenTilesAtOnce, meanwhile);
            };
            add(*panel.codes, step < panels, {more ? next.count() : 0, &next, load_next});
            for (int band = 1; band < kBands && panel.codes->bands >> band; ++band) {
                if (!(panel.codes->bands >> band & 1)) continue;
                Codes& further = all[kPanels - 1];
                further.bands = 0;
                for (std::ptrdiff_t i = 0; i < panel.count(); ++i) panel.load(i, band, further);
                add(further, false, {0, nullptr, nullptr});
            }
            panel = next;
        }
        experts_.kernels.end();
    }

    const TiledExperts experts_;
    const IntegerKernels& kernels_;
    const Tokens inputs_, activations_;
    const Scratch<float> floats_;   // [most_tiles, padded intermediate, 16]
    const Scratch<float> columns_;  // of each thread
    const Scratch<Codes> codes_;
};

}  // namespace

std::unique_ptr<ExpertForm> integer_experts(const TiledExperts& experts) { return std::make_unique<IntegerExperts>(experts); }

bool fits_integers(const ExpertLayer& layer, std::ptrdiff_t stored_expert) {
    for (const ExpertMatrix* matrix : {&layer.gate_up, &layer.down}) {
        if (!matrix->packed) return false;
        const Mxfp4Rows rows = mxfp4_of(*matrix, stored_expert);
        for (std::ptrdiff_t row = 0; row < matrix->rows; ++row) {
            const std::uint8_t* scales = rows.scales + row * rows.scale_stride;
            std::uint8_t largest = 0;
            for (std::ptrdiff_t b = 0; b < rows.columns / kBlock; ++b) largest = scales[b] > largest ? scales[b] : largest;
            if (largest > kLargestScale) return false;
        }
    }
    return true;
}

}  // namespace moe_surgery::cpu
