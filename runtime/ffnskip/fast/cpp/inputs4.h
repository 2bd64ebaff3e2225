// Sums over the kept inputs of 4-bit matrices that lie input by input, in integers of 16 bits.
#pragma once

#include <algorithm>
#include <cmath>

#include "kept.h"

constexpr int64_t ROWS = 64;  // outputs whose numbers lie in 32 bytes: outputs j and j + 32 share byte j

// The numbers of a vector that meet a run of inputs, in pairs: unit * (high + low / 128). They are small enough for 16
// bits to hold the sum of a whole group's products with numbers of 4 bits.
struct Numbers {
    static constexpr float LARGEST = 68;
    int8_t high[GROUP], low[GROUP];
    float unit, sum;

    void round(const float* x, int n) {
        float padded[GROUP] = {};
        memcpy(padded, x, n * sizeof(float));
        Floats sums = {};
        for (int k = 0; k < n; k += WIDTH) sums += load(padded + k);
        sum = ::sum(sums);
        const float largest = largest_of(padded, GROUP);
        const bool finite = largest <= 3e38f;
        unit = finite ? largest / LARGEST : NAN;  // the product is not a number either, whatever the integers are
        const float factor = finite ? LARGEST / largest : 0;
        for (int k = 0; k < n; k += WIDTH) {
            const Floats exact = load(padded + k) * factor, whole = rounded_to_whole(exact);
            to_integers(whole, high + k);
            to_integers(rounded_to_whole((exact - whole) * 128.0f), low + k);
        }
    }
};

// Kept inputs of one group, which share the factor and the offset of an output.
struct Run {
    int n = 0;
    int64_t first = 0;  // of the kept inputs
    const uint8_t* data[GROUP];
    const uint16_t* scale;

    // From kept input `at` on; gives the one behind.
    int64_t list(const Matrix& w, const Kept& kept, int64_t at, int64_t end) {
        first = at;
        const int32_t group = at < end ? kept.index[at] / GROUP : 0;
        for (n = 0; at < end && n < GROUP && kept.index[at] / GROUP == group; at++, n++)
            data[n] = static_cast<const uint8_t*>(w.data) + kept.index[at] * w.stretch / 2;
        if (n % 2) data[n] = data[n - 1];
        scale = static_cast<const uint16_t*>(w.scale) + group * w.stretch * 2;
        return at;
    }
};

// y += what eight sums of products stand for.
INLINE void add_sums(Ints high, Ints low, const uint16_t* scale, const Numbers& x, float* y) {
    const auto [factor, offset] = eight_pairs(scale);
    const Floats sums = __builtin_convertvector(high * 128 + low, Floats);
    store(y, load(y) + factor * sums * (x.unit / 128) + offset * x.sum);
}

// y += W x for the inputs of a run and 64 outputs from `row` on; meanwhile `fetched` is brought near.
INLINE void add_rows(const Run& run, const Numbers& x, int64_t row, const uint8_t* const* fetched, int n_fetched,
                     int64_t at, float* y) {
    Shorts high[4] = {}, low[4] = {};  // of both halves of the bytes, and of these half of the bytes each
    for (int k = 0; k < n_fetched; k++) __builtin_prefetch(fetched[k] + at, 0, 2);
    for (int k = 0; k < run.n; k += 2) {
        const Bytes a = load_bytes(run.data[k] + row / 2), b = load_bytes(run.data[k + 1] + row / 2);
        const Bytes four[2][2] = {{a & 15, b & 15}, {high_halves(a), high_halves(b)}};
        for (int half = 0; half < 2; half++)
            for (int part = 0; part < 2; part++) {
                const Bytes pairs = interleaved(four[half][0], four[half][1], part);
                high[2 * half + part] += pair_products(pairs, &x.high[k]);
                low[2 * half + part] += pair_products(pairs, &x.low[k]);
            }
    }
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) {  // part 0 has bytes 0 to 7 and 16 to 23, part 1 the others
            const int64_t r = row + i / 2 * 32 + i % 2 * 8 + half * 16;
            add_sums(half_of(high[i], half), half_of(low[i], half), run.scale + 2 * r, x, y + r);
        }
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
