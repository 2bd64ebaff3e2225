// Products of one matrix with many vectors: what a prompt needs.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "matrix.h"
#include "panels.h"
#include "team.h"

constexpr int64_t MANY = 132;  // vectors that an unpacked panel is multiplied with
constexpr int TILE = 6;        // of them at a time: their sums stay in registers
constexpr int FEW = 4;         // vectors, for which unpacking would take longer than the product

template <typename Multiply>
INLINE void by_count(int n, const Multiply& multiply) {
    switch (n) {
        case 1: return multiply(std::integral_constant<int, 1>());
        case 2: return multiply(std::integral_constant<int, 2>());
        case 3: return multiply(std::integral_constant<int, 3>());
        case 4: return multiply(std::integral_constant<int, 4>());
        case 5: return multiply(std::integral_constant<int, 5>());
        default: return multiply(std::integral_constant<int, TILE>());
    }
}

// y[t][r] = W[r] . x[t] + bias[r] for rows r in [begin, end) and t < n.
template <typename Panel>
static void multiply_panels(const Matrix& w, int64_t begin, int64_t end, int n, const typename Panel::Vector* x,
                            float* y) {
    Panel panel;
    float sums[MANY * PANEL];
    for (int64_t row = begin; row < end; row += PANEL) {
        std::fill_n(sums, n * PANEL, 0.0f);
        for (int64_t c = 0; c < w.columns; c += Panel::DEPTH) {
            const int64_t stop = std::min(w.columns, c + Panel::DEPTH);
            panel.unpack(w, row, c, stop);
            for (int t = 0; t < n; t += TILE)
                by_count(n - t, [&](auto count) {
                    panel.template multiply<count()>(c, stop, x + t, sums + t * PANEL);
                });
        }
        const int64_t rows = std::min(PANEL, end - row);
        for (int t = 0; t < n; t++)
            for (int64_t r = 0; r < rows; r++)
                y[t * w.rows + row + r] = sums[t * PANEL + r] + (w.bias ? w.bias[row + r] : 0.0f);
    }
}

// Whether the matrix is unpacked for so many vectors, or read row by row, as by a step.
INLINE bool unpacked(const Matrix& w, int64_t n) { return n > FEW || w.stretch; }

// The same for `n` vectors one behind the other; where the matrix is unpacked, `rounded` is what they are beside integers.
static void multiply_some(const Matrix& w, int64_t begin, int64_t end, int n, const float* x, const Rounded* rounded,
                          float* y) {
    const float* from[MANY];
    float* to[MANY];
    for (int t = 0; t < n; t++) {
        from[t] = x + t * w.columns;
        to[t] = y + t * w.rows;
    }
    if (!unpacked(w, n)) return multiply(w, begin, end, n, from, ::rounded(w.format, w.columns, n, from), to);
    switch (w.format) {
        case FLOAT32: return multiply_panels<FloatPanel<float>>(w, begin, end, n, from, y);
        case BFLOAT16: return multiply_panels<FloatPanel<uint16_t>>(w, begin, end, n, from, y);
        case INT8: return multiply_panels<IntegerPanel<INT8>>(w, begin, end, n, rounded, y);
        case INT4: return multiply_panels<IntegerPanel<INT4>>(w, begin, end, n, rounded, y);
    }
}

// y = W x + bias for `n` vectors one behind the other, in float32 or in bfloat16.
template <typename Number>
static void multiply_many(const Matrix& w, int64_t n, const Number* x, Number* y, int threads) {
    if (n <= 0) return;
    constexpr bool NARROW = std::is_same<Number, uint16_t>();
    const int64_t blocks = (n + MANY - 1) / MANY, most = ((n + blocks - 1) / blocks + TILE - 1) / TILE * TILE;
    const std::unique_ptr<float[]> wide(new float[NARROW ? most * w.columns : 0]);
    const std::unique_ptr<float[]> product(new float[NARROW ? most * w.rows : 0]);
    std::vector<Rounded> rounded(most);
    in_parallel(threads, [&](int id, int count, Barrier& barrier) {
        const auto [begin, end] = share(w.rows, id, count, PANEL);
        for (int64_t first = 0; first < n; first += most) {
            const int64_t some = std::min(most, n - first);
            const auto [mine, others] = share(some, id, count, 1);
            const bool rounds = w.scale && unpacked(w, some);
            const Number* given = x + first * w.columns;
            Number* wanted = y + first * w.rows;
            const float* from;
            float* to;
            if constexpr (NARROW) {
                from = wide.get(), to = product.get();
                for (int64_t i = mine * w.columns; i < others * w.columns; i++) wide[i] = widened(given + i);
            } else {
                from = given, to = wanted;
            }
            for (int64_t t = mine; rounds && t < others; t++) {
                rounded[t].round(from + t * w.columns, w.columns);
                if (w.format == INT4) rounded[t].add_up();
            }
            barrier.wait();
            multiply_some(w, begin, end, int(some), from, rounded.data(), to);
            barrier.wait();
            if constexpr (NARROW)
                for (int64_t i = mine * w.rows; i < others * w.rows; i++) put(wanted + i, to[i]);
        }
    });
}
