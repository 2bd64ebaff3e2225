// Products of one matrix of 8 or 4 bits with many vectors: what a prompt needs.
#pragma once

#include <algorithm>
#include <vector>

#include "inputs.h"
#include "team.h"

// As `multiply`, of a 4-bit matrix that lies input by input.
static void multiply_by_input4(const Matrix& w, int64_t begin, int64_t end, int n, const float* const* x,
                               float* const* y) {
    static thread_local Kept kept;
    static thread_local std::vector<float> sums, none;
    const int64_t rows = end - begin;
    sums.resize(MAX_BATCH * rows);
    none.assign(w.columns, 0.0f);
    const float* limits[MAX_BATCH];
    int64_t left_out[MAX_BATCH];
    std::fill(limits, limits + n, none.data());
    kept.list(n, x, limits, w.columns, left_out);
    Matrix mine = w;
    mine.data = static_cast<const uint8_t*>(w.data) + begin / 2;
    mine.scale = static_cast<const uint16_t*>(w.scale) + begin * 2;
    sum_inputs4(mine, kept, 0, kept.n, n, rows, sums.data());
    for (int t = 0; t < n; t++)
        for (int64_t r = 0; r < rows; r++) y[t][begin + r] = sums[t * rows + r] + (w.bias ? w.bias[begin + r] : 0.0f);
}

// Vectors that are multiplied at a time: many for each reading of the weights, few enough to stay in the second cache.
struct Together {
    static constexpr int64_t MOST = 64;
    int n;
    const float* x[MOST];
    float* y[MOST];

    Together(const Matrix& w, int64_t first, int64_t end, const float* from, float* to)
        : n(int(std::min(MOST, end - first))) {
        for (int t = 0; t < n; t++) {
            x[t] = from + (first + t) * w.columns;
            y[t] = to + (first + t) * w.rows;
        }
    }
};

// y = W x + bias for `n` vectors one behind the other.
static void multiply_many(const Matrix& w, int64_t n, const float* x, float* y, int threads) {
    std::vector<Rounded> rounded(Together::MOST);
    in_parallel(threads, [&](int id, int count, Barrier& barrier) {
        const auto [begin, end] = share(w.rows, id, count, ROWS);
        for (int64_t first = 0; first < n; first += Together::MOST) {
            const Together part(w, first, n, x, y);
            if (w.stretch) {
                for (int t = 0; t < part.n; t += MAX_BATCH)
                    multiply_by_input4(w, begin, end, std::min(MAX_BATCH, part.n - t), part.x + t, part.y + t);
                continue;
            }
            const auto [mine, others] = share(part.n, id, count, 1);
            for (int64_t t = mine; t < others; t++) round_for(w, part.x[t], rounded[t]);
            barrier.wait();
            multiply(w, begin, end, part.n, rounded.data(), part.y);
            barrier.wait();
        }
    });
}
