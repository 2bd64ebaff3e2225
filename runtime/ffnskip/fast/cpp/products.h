// Products of one matrix with many vectors: what a prompt needs.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "matrix.h"
#include "panels.h"
#include "team.h"

constexpr int64_t MANY = 22 * TILE;  // vectors that an unpacked panel is multiplied with
constexpr int FEW = 4;               // vectors, for which unpacking would take longer than the product

// y[t][r] = W[r] . x[t] + bias[r] for rows r in [begin, end) and t < n, at most MANY. Where vectors do not fill the
// last tile, what else is in it is of no account; it is best the last of them again.
template <typename Panel>
static void multiply_panels(const Matrix& w, int64_t begin, int64_t end, int64_t n, const typename Panel::Tiles& x,
                            float* y) {
    Panel panel;
    float sums[MANY * PANEL];
    for (int64_t row = begin; row < end; row += PANEL) {
        std::fill_n(sums, whole_tiles(n) * PANEL, 0.0f);
        for (int64_t c = 0; c < w.columns; c += Panel::DEPTH) {
            const int64_t stop = std::min(w.columns, c + Panel::DEPTH);
            panel.unpack(w, row, c, stop);
            for (int64_t t = 0; t < n; t += TILE) {
                if (n - t > TILE / 2) panel.template multiply<TILE>(c, stop, x, t, sums + t * PANEL);
                else panel.template multiply<TILE / 2>(c, stop, x, t, sums + t * PANEL);
            }
        }
        const int64_t rows = std::min(PANEL, end - row);
        for (int64_t t = 0; t < n; t++)
            for (int64_t r = 0; r < rows; r++)
                y[t * w.rows + row + r] = sums[t * PANEL + r] + (w.bias ? w.bias[row + r] : 0.0f);
    }
}

// `n` numbers as floats: as they are, or widened into `room`.
INLINE const float* floats(const float* x, int64_t, std::vector<float>&) { return x; }
INLINE const float* floats(const uint16_t* x, int64_t n, std::vector<float>& room) {
    room.resize(n);
    for (int64_t i = 0; i < n; i++) room[i] = widened(x + i);
    return room.data();
}

// y = W x + bias for `n` vectors one behind the other, by panels.
template <typename Panel, typename Number>
static void multiply_many(const Matrix& w, int64_t n, const Number* x, Number* y, int threads) {
    constexpr bool NARROW = std::is_same<Number, uint16_t>();
    const int64_t blocks = (n + MANY - 1) / MANY, most = whole_tiles((n + blocks - 1) / blocks);
    const std::unique_ptr<float[]> product(new float[NARROW ? most * w.rows : 0]);
    TileRoom tile_room(w.columns, most);
    in_parallel(threads, [&](int id, int count, Barrier& barrier) {
        typename Panel::Tiles tiles(tile_room, w.columns);
        std::vector<float> room[TILE];
        const auto [begin, end] = share(w.rows, id, count, PANEL);
        for (int64_t first = 0; first < n; first += most) {
            const int64_t some = std::min(most, n - first);
            const auto [mine, others] = share(some, id, count, TILE);
            for (int64_t t = mine; t < others; t += TILE) {
                const float* tile[TILE];
                for (int i = 0; i < TILE; i++)
                    tile[i] = floats(x + (first + std::min(t + i, some - 1)) * w.columns, w.columns, room[i]);
                tiles.put(t, tile);
            }
            barrier.wait();
            Number* wanted = y + first * w.rows;
            if constexpr (NARROW) {
                multiply_panels<Panel>(w, begin, end, some, tiles, product.get());
                barrier.wait();
                for (int64_t i = mine * w.rows; i < others * w.rows; i++) put(wanted + i, product[i]);
            } else {
                multiply_panels<Panel>(w, begin, end, some, tiles, wanted);
                barrier.wait();
            }
        }
    });
}

// The same for FEW vectors, row by row, as by a step.
template <typename Number>
static void multiply_few(const Matrix& w, int64_t n, const Number* x, Number* y, int threads) {
    std::vector<float> room[FEW], products(n * w.rows);
    const float* from[FEW];
    float* to[FEW];
    for (int64_t t = 0; t < n; t++) {
        from[t] = floats(x + t * w.columns, w.columns, room[t]);
        to[t] = &products[t * w.rows];
    }
    in_parallel(threads, [&](int id, int count, Barrier&) {
        const auto [begin, end] = share(w.rows, id, count, PANEL);
        multiply(w, begin, end, int(n), from, rounded(w.format, w.columns, int(n), from), to);
        for (int64_t t = 0; t < n; t++)
            for (int64_t i = begin; i < end; i++) put(y + t * w.rows + i, to[t][i]);
    });
}

template <typename Number>
static void multiply_any(const Matrix& w, int64_t n, const Number* x, Number* y, int threads) {
    if (n <= 0) return;
    if (n <= FEW && !w.stretch) return multiply_few(w, n, x, y, threads);
    switch (w.format) {
        case FLOAT32: return multiply_many<FloatPanel<float>>(w, n, x, y, threads);
        case BFLOAT16: return multiply_many<FloatPanel<uint16_t>>(w, n, x, y, threads);
        case INT8: return multiply_many<IntegerPanel<INT8>>(w, n, x, y, threads);
        case INT4: return multiply_many<IntegerPanel<INT4>>(w, n, x, y, threads);
    }
}
