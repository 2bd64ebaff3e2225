// Products of a weight matrix with the vectors of a batch. Weights are read once, whatever the number of vectors.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "integers.h"

// y[t][row] = W[row] . x[t] for T vectors. A row is read from its beginning to its end and then the next one, which is
// what the memory's prefetching likes best: four rows at a time take twice as long from a cold cache.
template <typename Number, int T>
INLINE void row_product(const Matrix& w, int64_t row, const float* const* x, float* const* y) {
    constexpr int64_t STEP = LINE / sizeof(Number);
    constexpr int64_t CHAINS = T == 1 ? STEP / WIDTH : T == 2 ? 2 : 1;  // sums that do not wait for each other
    const Number* data = static_cast<const Number*>(w.data) + row * w.columns;
    Floats sums[T][CHAINS] = {};
    int64_t c = 0;
    for (; c + STEP <= w.columns; c += STEP) {
        __builtin_prefetch(data + c + ROW_AHEAD / sizeof(Number));
        for (int64_t i = 0; i < STEP / WIDTH; i++) {
            const Floats weights = load(data + c + i * WIDTH);
            for (int t = 0; t < T; t++) sums[t][i % CHAINS] += weights * load(x[t] + c + i * WIDTH);
        }
    }
    for (int t = 0; t < T; t++) {
        for (int64_t i = 1; i < CHAINS; i++) sums[t][0] += sums[t][i];
        const float total = sum(sums[t][0]) + dot(data + c, x[t] + c, w.columns - c);
        y[t][row] = w.bias ? total + w.bias[row] : total;
    }
}

// Hands tiles of rows, which stay in the first cache, to as many vectors at a time as have a product of their own.
template <typename Vector, typename Product>
static void tiled(int64_t begin, int64_t end, int n, const Vector* x, float* const* y, const Product& product) {
    constexpr int64_t TILE = 32;
    for (int64_t row = begin; row < end; row += TILE) {
        const int64_t stop = row + TILE < end ? row + TILE : end;
        int t = 0;
        for (; t + 4 <= n; t += 4)
            for (int64_t r = row; r < stop; r++) product(std::integral_constant<int, 4>(), r, x + t, y + t);
        for (; t + 2 <= n; t += 2)
            for (int64_t r = row; r < stop; r++) product(std::integral_constant<int, 2>(), r, x + t, y + t);
        for (; t < n; t++)
            for (int64_t r = row; r < stop; r++) product(std::integral_constant<int, 1>(), r, x + t, y + t);
    }
}

// y[t][r] = W[r] . x[t] + bias[r] for rows r in [begin, end) and t < n; `integers` are what `rounded` makes of x.
static void multiply(const Matrix& w, int64_t begin, int64_t end, int n, const float* const* x,
                     const Rounded* integers, float* const* y) {
    switch (w.format) {
        case FLOAT32:
            return tiled(begin, end, n, x, y,
                         [&](auto t, int64_t row, auto x, auto y) { row_product<float, t()>(w, row, x, y); });
        case BFLOAT16:
            return tiled(begin, end, n, x, y,
                         [&](auto t, int64_t row, auto x, auto y) { row_product<uint16_t, t()>(w, row, x, y); });
        case INT8:
            return tiled(begin, end, n, integers, y,
                         [&](auto t, int64_t row, auto x, auto y) { row_product8<t()>(w, row, x, y); });
        case INT4:
            return tiled(begin, end, n, integers, y,
                         [&](auto t, int64_t row, auto x, auto y) { row_product4<t()>(w, row, x, y); });
    }
}

// One row of it, unpacked: an embedding.
static void unpack_row(const Matrix& w, int64_t row, float* y) {
    for (int64_t c = 0; c < w.columns; c++) switch (w.format) {
            case FLOAT32: y[c] = static_cast<const float*>(w.data)[row * w.columns + c]; break;
            case BFLOAT16: y[c] = widened(static_cast<const uint16_t*>(w.data) + row * w.columns + c); break;
            case INT8: {
                const float scale = static_cast<const float*>(w.scale)[row];
                y[c] = static_cast<const int8_t*>(w.data)[row * w.columns + c] * scale;
                break;
            }
            case INT4: {
                const int64_t group = row * w.columns / GROUP + c / GROUP, half = GROUP / 2;
                const uint8_t both = static_cast<const uint8_t*>(w.data)[group * half + c % half];
                const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + group * 2;
                y[c] = (c % GROUP < half ? both & 15 : both >> 4) * half_float(scale[0]) + half_float(scale[1]);
            }
        }
}
