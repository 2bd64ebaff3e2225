// Products of a weight matrix with the vectors of a batch. Weights are read once, whatever the number of vectors.
#pragma once

#include <type_traits>

#include "vectors.h"

enum Format : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };
constexpr int64_t GROUP = 32;  // columns of an int4 matrix that share a factor and an offset

struct Matrix {  // mirrors `ffnskip.fast.matrix.Matrix`; `data` is null where there is none
    const void* data;
    const void* scale;
    const float* bias;
    int64_t rows, columns;
    Format format;
};

// y[t][row] = W[row] . x[t] for T vectors. A row is read from its beginning to its end and then the next one, which is
// what the memory's prefetching likes best: four rows at a time take twice as long from a cold cache.
template <typename Number, int T>
INLINE void row_product(const Matrix& w, int64_t row, const float* const* x, float* const* y) {
    constexpr int CHAINS = T == 1 ? 4 : T == 2 ? 2 : 1;  // sums that do not wait for each other
    const Number* data = static_cast<const Number*>(w.data) + row * w.columns;
    Floats sums[T][CHAINS] = {};
    int64_t c = 0;
    for (; c + CHAINS * WIDTH <= w.columns; c += CHAINS * WIDTH)
        for (int i = 0; i < CHAINS; i++) {
            const Floats weights = load(data + c + i * WIDTH);
            for (int t = 0; t < T; t++) sums[t][i] += weights * load(x[t] + c + i * WIDTH);
        }
    for (int t = 0; t < T; t++) {
        for (int i = 1; i < CHAINS; i++) sums[t][0] += sums[t][i];
        float total = sum(sums[t][0]) + dot(data + c, x[t] + c, w.columns - c);
        if (w.format == INT8) total *= static_cast<const float*>(w.scale)[row];
        y[t][row] = w.bias ? total + w.bias[row] : total;
    }
}

struct Int4 {};  // chooses the product below

// A group's numbers are factor * n + offset with n of 4 bits.
template <int T>
INLINE void row_product4(const Matrix& w, int64_t row, const float* const* x, float* const* y) {
    const int64_t groups = w.columns / GROUP;
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + row * w.columns / 2;
    const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + row * groups * 2;
    Floats lower[T] = {}, upper[T] = {};
    for (int64_t g = 0; g < groups; g++) {
        const Floats factor = spread(one(scale + g * 2)), offset = spread(one(scale + g * 2 + 1));
        for (int64_t k = 0; k < GROUP / 2; k += WIDTH) {
            const Ints both = widen(data + g * GROUP / 2 + k);
            const Floats low = __builtin_convertvector(both & 15, Floats) * factor + offset;
            const Floats high = __builtin_convertvector(both >> 4, Floats) * factor + offset;
            for (int t = 0; t < T; t++) {
                lower[t] += low * load(x[t] + g * GROUP + k);
                upper[t] += high * load(x[t] + g * GROUP + GROUP / 2 + k);
            }
        }
    }
    for (int t = 0; t < T; t++) y[t][row] = sum(lower[t] + upper[t]) + (w.bias ? w.bias[row] : 0.0f);
}

template <typename Number, int T>
static void rows(const Matrix& w, int64_t begin, int64_t end, const float* const* x, float* const* y) {
    for (int64_t row = begin; row < end; row++) {
        if constexpr (std::is_same_v<Number, Int4>) row_product4<T>(w, row, x, y);
        else row_product<Number, T>(w, row, x, y);
    }
}

template <typename Number>
static void batch(const Matrix& w, int64_t begin, int64_t end, int n, const float* const* x, float* const* y) {
    constexpr int64_t TILE = 32;  // rows that stay in the first cache while the vectors take turns
    for (int64_t row = begin; row < end; row += TILE) {
        const int64_t stop = row + TILE < end ? row + TILE : end;
        int t = 0;
        for (; t + 4 <= n; t += 4) rows<Number, 4>(w, row, stop, x + t, y + t);
        for (; t + 2 <= n; t += 2) rows<Number, 2>(w, row, stop, x + t, y + t);
        for (; t < n; t++) rows<Number, 1>(w, row, stop, x + t, y + t);
    }
}

// y[t][r] = W[r] . x[t] + bias[r] for rows r in [begin, end) and t < n.
static void multiply(const Matrix& w, int64_t begin, int64_t end, int n, const float* const* x, float* const* y) {
    switch (w.format) {
        case FLOAT32: return batch<float>(w, begin, end, n, x, y);
        case BFLOAT16: return batch<uint16_t>(w, begin, end, n, x, y);
        case INT8: return batch<int8_t>(w, begin, end, n, x, y);
        case INT4: return batch<Int4>(w, begin, end, n, x, y);
    }
}

// One row of it, unpacked: an embedding.
static void unpack_row(const Matrix& w, int64_t row, float* y) {
    for (int64_t c = 0; c < w.columns; c++) switch (w.format) {
            case FLOAT32: y[c] = static_cast<const float*>(w.data)[row * w.columns + c]; break;
            case BFLOAT16: y[c] = one(static_cast<const uint16_t*>(w.data) + row * w.columns + c); break;
            case INT8: y[c] = static_cast<const int8_t*>(w.data)[row * w.columns + c] * static_cast<const float*>(w.scale)[row]; break;
            case INT4: {
                const uint8_t both = static_cast<const uint8_t*>(w.data)[row * w.columns / 2 + c / GROUP * (GROUP / 2) + c % (GROUP / 2)];
                const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + (row * w.columns / GROUP + c / GROUP) * 2;
                y[c] = (c % GROUP < GROUP / 2 ? both & 15 : both >> 4) * one(scale) + one(scale + 1);
            }
        }
}
