// Sums over the kept inputs of 4-bit matrices that lie input by input, in integers of 16 bits.
#pragma once

#include <algorithm>
#include <cmath>

#include "kept.h"

constexpr int64_t ROWS = 64;  // outputs whose numbers lie in 32 bytes: outputs j and j + 32 share byte j

// The numbers of a vector that meet the kept inputs of a group: unit * (high + low / 128). They are small enough for 16
// bits to hold the sum of their products with numbers of 4 bits.
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

// Sums of products with the high and the low parts, for 64 outputs: of both halves of the bytes, and of these half of
// the bytes each.
struct Tile {
    Shorts high[4], low[4];
};

// tiles += the products of a few inputs of one group with the numbers from `k` on; those from 0 on begin the sums.
// Meanwhile the inputs `next` are brought near. Sums of a whole group could stay in registers, but then 32 stretches
// would be read by turns, which memory likes less.
INLINE void add_inputs4(const uint8_t* const* w, const uint8_t* const* next, const Numbers& x, int k, int64_t bytes,
                        Tile* tiles) {
    constexpr int64_t TILE = ROWS / 2;  // bytes
    for (int64_t at = 0; at < bytes; at += TILE, tiles++) {
        if (next && at % LINE == 0)
            for (int i = 0; i < AT_ONCE; i++) __builtin_prefetch(next[i] + at, 0, 2);
        Tile tile = k ? *tiles : Tile{};
        for (int i = 0; i < AT_ONCE; i += 2) {
            const Bytes a = load_bytes(w[i] + at), b = load_bytes(w[i + 1] + at);
            const Bytes four[2][2] = {{a & 15, b & 15}, {high_halves(a), high_halves(b)}};
            for (int half = 0; half < 2; half++)
                for (int part = 0; part < 2; part++) {
                    const Bytes pairs = interleaved(four[half][0], four[half][1], part);
                    tile.high[2 * half + part] += pair_products(pairs, &x.high[k + i]);
                    tile.low[2 * half + part] += pair_products(pairs, &x.low[k + i]);
                }
        }
        *tiles = tile;
    }
}

// y += what the sums of a group stand for.
INLINE void add_group(const Tile* tiles, const uint16_t* scale, const Numbers& x, int64_t n, float* y) {
    for (int64_t row = 0; row < n; row += ROWS, tiles++)
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++) {  // part 0 has bytes 0 to 7 and 16 to 23, part 1 the others
                const int64_t r = row + i / 2 * 32 + i % 2 * 8 + half * 16;
                const auto [factor, offset] = eight_pairs(scale + 2 * r);
                const Ints sums = half_of(tiles->high[i], half) * 128 + half_of(tiles->low[i], half);
                const Floats products = __builtin_convertvector(sums, Floats) * (x.unit / 128);
                store(y + r, load(y + r) + factor * products + offset * x.sum);
            }
}

// As `sum_inputs` does for other formats: y[t * n ..] = the sum over kept inputs [begin, end).
static void sum_inputs4(const Matrix& w, const Kept& kept, int64_t begin, int64_t end, int vectors, int64_t n,
                        float* y) {
    static thread_local std::vector<Tile> tiles;
    const int64_t bytes = w.stretch / 2, per_vector = n / ROWS;
    tiles.resize(vectors * per_vector);
    std::fill(y, y + vectors * n, 0.0f);
    Numbers x[MAX_BATCH];
    const uint8_t *now[AT_ONCE], *next[AT_ONCE];
    const auto list = [&](int64_t at, int64_t stop, const uint8_t** inputs) {
        for (int i = 0; i < AT_ONCE; i++)
            inputs[i] = static_cast<const uint8_t*>(w.data) + kept.index[std::min(at + i, stop - 1)] * bytes;
    };
    for (int64_t at = begin, stop; at < end; at = stop) {
        const int32_t group = kept.index[at] / GROUP;
        stop = at + 1;  // a whole group may have the last input's repetitions behind it
        while (stop < end && stop < at + GROUP && kept.index[stop] / GROUP == group) stop++;
        for (int t = 0; t < vectors; t++) x[t].round(kept.of(t) + at, int(stop - at));
        const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + group * w.stretch * 2;
        for (int64_t first = at; first < stop; first += AT_ONCE) {
            const int64_t behind = std::min(first + AT_ONCE, stop);
            list(first, stop, now);
            list(behind, end, next);
            for (int t = 0; t < vectors; t++)
                add_inputs4(now, t == 0 && behind < end ? next : nullptr, x[t], int(first - at), n / 2,
                            &tiles[t * per_vector]);
        }
        for (int t = 0; t < vectors; t++) add_group(&tiles[t * per_vector], scale, x[t], n, y + t * n);
    }
}
