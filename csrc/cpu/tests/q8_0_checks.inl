// Products with rows of Q8_0 against float64; included by selftest.cpp.

void check_q8_0(Checked& check, Shape s) {
    const std::ptrdiff_t blocks = s.columns / kBlock, stride = q8_0_row_bytes(s.columns);
    Bytes weight = random_bytes(s.rows * stride);  // what pads a row may be anything
    for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
        for (std::ptrdiff_t b = 0; b < blocks; ++b) {  // a scale around 1, of either sign
            weight[static_cast<std::size_t>(r * stride + s.columns + 2 * b + 1)] &= 0xbf;
        }
    }
    const auto value = [&](std::ptrdiff_t r, std::ptrdiff_t c) {
        const std::ptrdiff_t start = c / kActBlock * kActBlock, n = std::min(kLanes, blocks - start / kBlock);
        const std::ptrdiff_t i = c % kActBlock / kBlock, in_block = c % kBlock;
        const auto code = static_cast<std::int8_t>(
            weight[static_cast<std::size_t>(r * stride + start + 2 * (n * (in_block / 2) + i) + in_block % 2)]);
        const std::ptrdiff_t scale = (r * stride + s.columns) / 2 + c / kBlock;
        return code * value_of(weight, scale, Dtype::f16);
    };
    const Floats x = random_floats(s.tokens * s.columns);
    std::vector<double> exact, size;
    for (std::ptrdiff_t t = 0; t < s.tokens; ++t) {
        for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
            double sum = 0, terms = 0;
            for (std::ptrdiff_t c = 0; c < s.columns; ++c) {
                const double w = value(r, c);
                sum += w * x[static_cast<std::size_t>(t * s.columns + c)];
                terms += std::fabs(w) * 4;  // activations are rounded to a part of their block's largest, about 3
            }
            exact.push_back(sum);
            size.push_back(terms);
        }
    }
    compare(check, "q8_0_rows", s, [&](const Kernels& kernels, Floats& y) {
        const std::ptrdiff_t width = act_blocks_of(s.columns);
        std::vector<WordBlock512> word_blocks(static_cast<std::size_t>(s.tokens * width));
        std::vector<Words> rows;
        for (std::ptrdiff_t t = 0; t < s.tokens; ++t) {
            rows.push_back(word_blocks.data() + t * width);
            kernels.quantize_words(x.data() + t * s.columns, s.columns, word_blocks.data() + t * width);
        }
        kernels.q8_0_rows({weight.data(), stride, s.columns, Dtype::q8_0}, 0, s.rows, rows.data(), s.tokens, y.data(), s.rows);
    }, exact, size, 2e-5);
}
