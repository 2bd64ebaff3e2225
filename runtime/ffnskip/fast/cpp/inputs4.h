// Sums over the kept inputs of 4-bit matrices that lie input by input, in integers of 16 bits.
#pragma once

#include <algorithm>
#include <cmath>

#include "kept.h"

constexpr int64_t ROWS = 64;  // outputs whose numbers share words: of 16 words, each has one of every sixteen outputs
constexpr int RUN = 16;       // inputs whose products 16 bits can add up

// The numbers of a vector that meet a run of inputs: unit * (high + low / 128), with high of 8 and low of 7 bits.
struct Numbers {
    int16_t high[RUN], low[RUN];
    float unit, sum;

    void round(const float* x, int n) {
        float largest = 1e-30f;
        sum = 0;
        for (int k = 0; k < n; k++) {
            largest = std::max(largest, std::fabs(x[k]));
            sum += x[k];
        }
        const bool finite = std::fabs(sum) <= 3e38f;
        unit = finite ? largest / 127 : NAN;  // the product is not a number either, whatever the integers are
        for (int k = 0; k < n; k++) {
            const float exact = finite ? x[k] * (127 / largest) : 0, rounded = std::nearbyint(exact);
            high[k] = int16_t(rounded);
            low[k] = int16_t(std::nearbyint((exact - rounded) * 128));
        }
    }
};

// Kept inputs of one group, which share the factor and the offset of an output.
struct Run {
    int n = 0;
    int64_t first = 0;  // of the kept inputs
    const uint8_t* data[RUN];
    const uint16_t* scale;

    // From kept input `at` on; gives the one behind.
    int64_t list(const Matrix& w, const Kept& kept, int64_t at, int64_t end) {
        first = at;
        for (n = 0; at < end && n < RUN && kept.index[at] / GROUP == kept.index[first] / GROUP; at++, n++)
            data[n] = static_cast<const uint8_t*>(w.data) + kept.index[at] * w.stretch / 2;
        if (n) scale = static_cast<const uint16_t*>(w.scale) + kept.index[first] / GROUP * w.stretch * 2;
        return at;
    }
};

INLINE void add_sums(const Shorts& high, const Shorts& low, const uint16_t* scale, const Numbers& x, float* y) {
    for (int half = 0; half < 2; half++, y += WIDTH, scale += 2 * WIDTH) {
        Ints both;
        memcpy(&both, scale, sizeof(both));
        const Floats factor = (Floats)(both << 16), offset = (Floats)(both & int32_t(0xffff0000));
        const Ints sums = half_of(high, half) * 128 + half_of(low, half);
        store(y, load(y) + factor * __builtin_convertvector(sums, Floats) * (x.unit / 128) + offset * x.sum);
    }
}

// y += W x for the inputs of a run and 64 outputs from `row` on; meanwhile `fetched` is brought near.
INLINE void add_rows(const Run& run, const Numbers& x, int64_t row, const uint8_t* const* fetched, int n_fetched,
                     int64_t at, float* y) {
    Shorts high[4] = {}, low[4] = {};
    for (int k = 0; k < n_fetched; k++) __builtin_prefetch(fetched[k] + at, 0, 2);
    for (int k = 0; k < run.n; k++) {
        const Words four = load_words(run.data[k] + row / 2);
        for (int q = 0; q < 4; q++) {
            const Shorts one = (Shorts)(four >> (4 * q) & 15);
            high[q] += one * x.high[k];
            low[q] += one * x.low[k];
        }
    }
    for (int q = 0; q < 4; q++) add_sums(high[q], low[q], run.scale + 2 * (row + 16 * q), x, y + row + 16 * q);
}

// As `sum_inputs` does for other formats: y[t * n ..] = the sum over kept inputs [begin, end).
static void sum_inputs4(const Matrix& w, const Kept& kept, int64_t begin, int64_t end, int vectors, int64_t n,
                        float* y) {
    constexpr int64_t AHEAD = 512, LINE = 64;  // bytes
    std::fill(y, y + vectors * n, 0.0f);
    const int64_t bytes = n / 2, ahead = std::min(AHEAD, bytes / LINE * LINE);
    Run runs[2];
    Run *now = &runs[0], *next = &runs[1];
    Numbers x;
    for (int64_t at = now->list(w, kept, begin, end); now->n; std::swap(now, next)) {
        at = next->list(w, kept, at, end);
        for (int t = 0; t < vectors; t++) {
            x.round(kept.of(t) + now->first, now->n);
            for (int64_t row = 0; row < n; row += ROWS) {
                const int64_t behind = row / 2 + ahead;
                const Run& fetched = behind < bytes ? *now : *next;
                const bool once = t == 0 && behind % LINE == 0;
                add_rows(*now, x, row, fetched.data, once ? fetched.n : 0, behind % bytes, y + t * n);
            }
        }
    }
}
