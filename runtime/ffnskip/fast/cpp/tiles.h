// The vectors that a panel is multiplied with: some of them side by side, number by number, so that what a step of the
// product takes from each is one stretch of memory.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "integers.h"

#if defined(__AVX512VNNI__)
constexpr int TILE = 12;  // vectors: as many as leave their sums in registers
#else
constexpr int TILE = 6;
#endif

INLINE int64_t whole_tiles(int64_t n) { return (n + TILE - 1) / TILE * TILE; }

struct FloatTiles {
    FloatTiles(const Matrix& w, int64_t n) : columns(w.columns), numbers(new float[whole_tiles(n) * columns]) {}

    // The tile that begins with vector `t`.
    void put(int64_t t, const float* const* x) {
        float* to = numbers.get() + t * columns;
        for (int64_t c = 0; c < columns; c++, to += TILE)
            for (int i = 0; i < TILE; i++) to[i] = x[i][c];
    }

    // What is in it from column `c` on.
    const float* at(int64_t t, int64_t c) const { return numbers.get() + t * columns + c * TILE; }

    const int64_t columns;
    const std::unique_ptr<float[]> numbers;
};

// The same in integers, two columns at a time.
struct IntegerTiles {
    IntegerTiles(const Matrix& w, int64_t n)
        : given(w.columns), columns((given + 1) / 2 * 2), has_offsets(w.format == INT4), rounded(whole_tiles(n)),
          numbers(new int16_t[whole_tiles(n) * columns]) {}

    void put(int64_t t, const float* const* x) {
        const int16_t* from[TILE];
        for (int i = 0; i < TILE; i++) {
            rounded[t + i].round(x[i], given);
            if (has_offsets) rounded[t + i].add_up();
            from[i] = rounded[t + i].numbers.data();
        }
        int16_t* to = numbers.get() + t * columns;
        for (int64_t c = 0; c < columns; c += 2, to += 2 * TILE)
            for (int i = 0; i < TILE; i++) std::copy_n(from[i] + c, 2, to + 2 * i);
    }

    const int16_t* at(int64_t t, int64_t c) const { return numbers.get() + t * columns + c * TILE; }

    const int64_t given, columns;  // the latter in whole pairs
    const bool has_offsets;
    std::vector<Rounded> rounded;
    const std::unique_ptr<int16_t[]> numbers;
};
