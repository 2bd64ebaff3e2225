// Products of one matrix with many vectors: what a prompt needs.
#pragma once

#include <algorithm>
#include <vector>

#include "inputs.h"
#include "team.h"

// y[t][row] = W[row] . x[t] + bias[row] for rows [begin, end) of a 4-bit matrix that lies input by input.
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

// This thread's share of W's rows, for `n` vectors one behind the other.
static void multiply_many(const Matrix& w, int64_t n, const float* x, float* y, int id, int count) {
    const auto [begin, end] = share(w.rows, id, count, ROWS);
    for (int64_t first = 0; first < n; first += MAX_BATCH) {
        const int together = int(std::min<int64_t>(MAX_BATCH, n - first));
        const float* from[MAX_BATCH];
        float* to[MAX_BATCH];
        for (int t = 0; t < together; t++) {
            from[t] = x + (first + t) * w.columns;
            to[t] = y + (first + t) * w.rows;
        }
        if (w.stretch) multiply_by_input4(w, begin, end, together, from, to);
        else multiply(w, begin, end, together, from, to);
    }
}
