// Products of a weight matrix with the vectors of a batch. Weights are read once, whatever the number of vectors.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vectors.h"

constexpr int MAX_BATCH = 16;  // vectors that one product may take

enum Format : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };
constexpr int64_t GROUP = 32;  // columns of an int4 matrix that share a factor and an offset

struct Matrix {  // `data` is null where there is none
    const void* data;
    const void* scale;
    const float* bias;
    int64_t rows, columns;
    int64_t stretch;  // numbers from one column to the next where columns lie one behind the other; 0: rows do
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
        const float total = sum(sums[t][0]) + dot(data + c, x[t] + c, w.columns - c);
        y[t][row] = w.bias ? total + w.bias[row] : total;
    }
}

// A group's numbers are factor * n + offset with n of 4 bits.
template <int T>
INLINE void row_product4(const Matrix& w, int64_t row, const float* const* x, float* const* y) {
    const int64_t groups = w.columns / GROUP;
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + row * w.columns / 2;
    const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + row * groups * 2;
    Floats lower[T] = {}, upper[T] = {};
    for (int64_t g = 0; g < groups; g++) {
        const Floats factor = spread(widened(scale + g * 2)), offset = spread(widened(scale + g * 2 + 1));
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

// The vectors of an int8 product, rounded to 16 bits with a scale per stretch of columns, so that products are of
// integers: twice as many at a time, and exact. A stretch is too short for their sum to overflow.
constexpr int64_t STRETCH = 256;
struct Rounded {
    std::vector<int16_t> numbers;
    std::vector<float> scales;

    void round(const float* x, int64_t n) {
        numbers.resize(n);
        scales.resize((n + STRETCH - 1) / STRETCH);
        for (int64_t begin = 0; begin < n; begin += STRETCH) {
            const int64_t end = begin + STRETCH < n ? begin + STRETCH : n;
            float largest = 1e-30f;
            bool finite = true;
            for (int64_t i = begin; i < end; i++) {
                largest = std::max(largest, std::fabs(x[i]));
                finite &= std::fabs(x[i]) <= 3e38f;
            }
            scales[begin / STRETCH] = finite ? largest / 32767 : NAN;
            if (!finite) continue;  // the product is not a number, whatever the integers are
            for (int64_t i = begin; i < end; i++) numbers[i] = int16_t(std::nearbyint(x[i] * (32767 / largest)));
        }
    }
};

template <int T>
INLINE void row_product8(const Matrix& w, int64_t row, const Rounded* x, float* const* y) {
    const int8_t* data = static_cast<const int8_t*>(w.data) + row * w.columns;
    float totals[T] = {};
    Floats sums[T] = {};
    for (int64_t begin = 0; begin < w.columns; begin += STRETCH) {
        const int64_t end = begin + STRETCH < w.columns ? begin + STRETCH : w.columns, stretch = begin / STRETCH;
        Ints even[T] = {}, odd[T] = {};
        int64_t c = begin;
        for (; c + 4 * WIDTH <= end; c += 4 * WIDTH)
            for (int t = 0; t < T; t++) {
                even[t] += products(data + c, &x[t].numbers[c]);
                odd[t] += products(data + c + 2 * WIDTH, &x[t].numbers[c + 2 * WIDTH]);
            }
        for (int t = 0; t < T; t++) {
            int32_t rest = 0;
            for (int64_t i = c; i < end; i++) rest += data[i] * x[t].numbers[i];
            totals[t] += float(rest) * x[t].scales[stretch];
            sums[t] += __builtin_convertvector(even[t] + odd[t], Floats) * x[t].scales[stretch];
        }
    }
    for (int t = 0; t < T; t++) {
        const float total = (sum(sums[t]) + totals[t]) * static_cast<const float*>(w.scale)[row];
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

// y[t][r] = W[r] . x[t] + bias[r] for rows r in [begin, end) and t < n.
static void multiply(const Matrix& w, int64_t begin, int64_t end, int n, const float* const* x, float* const* y) {
    switch (w.format) {
        case FLOAT32:
            return tiled(begin, end, n, x, y,
                         [&](auto t, int64_t row, auto x, auto y) { row_product<float, t()>(w, row, x, y); });
        case BFLOAT16:
            return tiled(begin, end, n, x, y,
                         [&](auto t, int64_t row, auto x, auto y) { row_product<uint16_t, t()>(w, row, x, y); });
        case INT8: {
            static thread_local std::vector<Rounded> rounded;
            if (int64_t(rounded.size()) < n) rounded.resize(n);
            for (int t = 0; t < n; t++) rounded[t].round(x[t], w.columns);
            return tiled(begin, end, n, rounded.data(), y,
                         [&](auto t, int64_t row, auto x, auto y) { row_product8<t()>(w, row, x, y); });
        }
        case INT4:
            return tiled(begin, end, n, x, y,
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
                y[c] = (c % GROUP < half ? both & 15 : both >> 4) * widened(scale) + widened(scale + 1);
            }
        }
}
