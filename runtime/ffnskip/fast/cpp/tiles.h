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

// Where tiles are put: shared by the threads of a product, and used again by the next.
struct TileRoom {
    TileRoom(int64_t columns, int64_t n) : numbers(new float[whole_tiles(n) * columns]), rounded(whole_tiles(n)) {}
    const std::unique_ptr<float[]> numbers;
    std::vector<Rounded> rounded;
};

struct FloatTiles {
    FloatTiles(TileRoom& room, int64_t columns) : columns(columns), numbers(room.numbers.get()) {}

    // The tile that begins with vector `t`.
    void put(int64_t t, const float* const* x) {
        float* to = numbers + t * columns;
        for (int64_t c = 0; c < columns; c++, to += TILE)
            for (int i = 0; i < TILE; i++) to[i] = x[i][c];
    }

    // What is in it from column `c` on.
    const float* at(int64_t t, int64_t c) const { return numbers + t * columns + c * TILE; }

    const int64_t columns;
    float* const numbers;
};

// The same in integers, two columns at a time.
struct IntegerTiles {
    IntegerTiles(TileRoom& room, int64_t columns)
        : columns(columns), even((columns + 1) / 2 * 2), rounded(room.rounded.data()),
          numbers(reinterpret_cast<int16_t*>(room.numbers.get())) {}

    void put(int64_t t, const float* const* x) {
        const int16_t* from[TILE];
        for (int i = 0; i < TILE; i++) {
            rounded[t + i].round(x[i], columns);
            rounded[t + i].add_up();
            from[i] = rounded[t + i].numbers.data();
        }
        int16_t* to = numbers + t * even;
        for (int64_t c = 0; c < even; c += 2, to += 2 * TILE)
            for (int i = 0; i < TILE; i++) std::copy_n(from[i] + c, 2, to + 2 * i);
    }

    const int16_t* at(int64_t t, int64_t c) const { return numbers + t * even + c * TILE; }

    const int64_t columns, even;
    Rounded* const rounded;
    int16_t* const numbers;
};
