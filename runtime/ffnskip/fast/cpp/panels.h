// Some rows of a matrix, some of their columns, unpacked: what a product with many vectors reads again and again.
// Numbers lie column by column, integers by pairs of columns, so that each of a vector's sums is that of another row.
#pragma once

#include <algorithm>

#include "inputs4.h"
#include "tiles.h"

// These products are arithmetic and not reading, so they take the widest registers that there are.
#if defined(__AVX512VNNI__)
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = WIDTH;
#endif
constexpr int64_t PANEL = 2 * LANES, SIXTEEN = 16;  // rows of a panel, and of those that are unpacked at a time

typedef float FloatSums __attribute__((vector_size(LANES * 4)));
typedef int32_t IntSums __attribute__((vector_size(LANES * 4)));

INLINE FloatSums load_lanes(const float* from) {
    FloatSums x;
    memcpy(&x, from, sizeof(x));
    return x;
}
INLINE void store_lanes(float* to, FloatSums x) { memcpy(to, &x, sizeof(x)); }

// sums + products of pairs of numbers with the same two.
INLINE IntSums add_pairs(IntSums sums, const int16_t* two, const int16_t* pairs) {
#if defined(__AVX512VNNI__)
    int32_t both;
    memcpy(&both, two, sizeof(both));
    return (IntSums)_mm512_dpwssd_epi32((__m512i)sums, _mm512_set1_epi32(both), _mm512_loadu_si512(pairs));
#else
    return add_products(sums, spread_pair(two), pairs);
#endif
}

#if defined(__AVX2__)
// Eight times eight numbers of 32 bits: what was a row is a column.
INLINE void transpose(Ints* x) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32((__m256i)x[i], (__m256i)x[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32((__m256i)x[i], (__m256i)x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        x[i] = (Ints)_mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        x[i + 4] = (Ints)_mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}
// a[0] b[0] a[1] b[1] ...
INLINE void interleave(Shorts a, Shorts b, Ints* pairs) {
    const __m256i low = _mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
    const __m256i high = _mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
    pairs[0] = (Ints)_mm256_permute2x128_si256(low, high, 0x20);
    pairs[1] = (Ints)_mm256_permute2x128_si256(low, high, 0x31);
}
#else
INLINE void transpose(Ints* x) {
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < i; j++) {
            const int32_t below = x[i][j];
            x[i][j] = x[j][i];
            x[j][i] = below;
        }
}
INLINE void interleave(Shorts a, Shorts b, Ints* pairs) {
    int16_t mixed[2 * SIXTEEN];
    for (int i = 0; i < SIXTEEN; i++) {
        mixed[2 * i] = a[i];
        mixed[2 * i + 1] = b[i];
    }
    memcpy(pairs, mixed, sizeof(mixed));
}
#endif

// Where `N` numbers of a row from column `c` on lie, or of column `c` from a row on where columns lie one behind the
// other; in `room`, with zeros behind them, if fewer are left.
template <int64_t N, typename Number>
INLINE const Number* locate(const Matrix& w, int64_t row, int64_t c, Number* room) {
    const Number* data = static_cast<const Number*>(w.data);
    const int64_t left = w.stretch ? (c < w.columns ? w.rows - row : 0) : w.columns - c;
    data += w.stretch ? c * w.stretch + row : row * w.columns + c;
    if (left >= N) return data;
    std::fill_n(room, N, Number());
    if (left > 0) std::copy_n(data, left, room);
    return room;
}

template <typename Stored>
struct FloatPanel {
    using Tiles = FloatTiles;
    static constexpr int64_t DEPTH = 4096 / PANEL;  // columns, of which the first cache holds a panel
    float numbers[DEPTH * PANEL];

    void unpack(const Matrix& w, int64_t row, int64_t begin, int64_t end) {
        Stored room[WIDTH];
        for (int64_t first = 0; first < PANEL; first += WIDTH) {
            float* to = numbers + first;
            for (int64_t c = begin; w.stretch && c < end; c++, to += PANEL)
                store(to, load(locate<WIDTH>(w, row + first, c, room)));
            for (int64_t c = begin; !w.stretch && c < end; c += WIDTH) {
                Ints eight[WIDTH];
                for (int64_t i = 0; i < WIDTH; i++)
                    eight[i] = (Ints)load(locate<WIDTH>(w, std::min(row + first + i, w.rows - 1), c, room));
                transpose(eight);
                for (int64_t i = 0; i < WIDTH; i++, to += PANEL) store(to, (Floats)eight[i]);
            }
        }
    }

    // y[t] += the product of the columns from `begin` to `end` with T vectors from the first of a tile on. Loops over
    // these must be unrolled, or their sums go through memory.
    template <int T>
    void multiply(int64_t begin, int64_t end, const Tiles& x, int64_t tile, float* y) const {
        FloatSums sums[T][2];
        const float *from = numbers, *with = x.at(tile, begin);
#pragma GCC unroll 12
        for (int t = 0; t < T; t++)
            for (int i = 0; i < 2; i++) sums[t][i] = load_lanes(y + t * PANEL + i * LANES);
        for (int64_t c = begin; c < end; c++, from += PANEL, with += TILE) {
            const FloatSums first = load_lanes(from), second = load_lanes(from + LANES);
#pragma GCC unroll 12
            for (int t = 0; t < T; t++) {
                sums[t][0] += with[t] * first;
                sums[t][1] += with[t] * second;
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < T; t++)
            for (int i = 0; i < 2; i++) store_lanes(y + t * PANEL + i * LANES, sums[t][i]);
    }
};

// Sixteen numbers of a row from column `c` on, or sixteen rows of a column.
template <Format FORMAT>
INLINE Shorts sixteen(const Matrix& w, int64_t row, int64_t c) {
    if (FORMAT == INT8) {
        int8_t room[SIXTEEN];
        return widen16(locate<SIXTEEN>(w, row, c, room));
    }
    const uint8_t* data = static_cast<const uint8_t*>(w.data);
    const int64_t half = w.stretch ? ROWS / 2 : GROUP / 2, at = w.stretch ? row : c;  // the two numbers of a byte
    data += (w.stretch ? c * w.stretch : row * w.columns) / 2 + at / (2 * half) * half + at % half;
    return nibbles(data, at / half % 2);
}

template <Format FORMAT>
struct IntegerPanel {
    using Tiles = IntegerTiles;
    static constexpr int64_t DEPTH = STRETCH;  // columns, whose numbers in a vector have one scale
    static constexpr int64_t RUN = FORMAT == INT4 ? GROUP : STRETCH;  // columns, whose numbers in a row have one factor
    int16_t numbers[DEPTH * PANEL];
    float factors[DEPTH / RUN * PANEL], offsets[DEPTH / RUN * PANEL];

    void unpack(const Matrix& w, int64_t row, int64_t begin, int64_t end) {
        for (int64_t first = 0; first < PANEL; first += SIXTEEN)
            unpack_sixteen(w, row + first, begin, end, numbers + 2 * first);
        for (int64_t c = begin; c < end; c += RUN) scale(w, row, c / GROUP, (c - begin) / RUN * PANEL);
    }

    // As FloatPanel's.
    template <int T>
    void multiply(int64_t begin, int64_t end, const Tiles& x, int64_t tile, float* y) const {
        const int16_t *from = numbers, *with = x.at(tile, begin);
        const Rounded* rounded = &x.rounded[tile];
        for (int64_t run = begin; run < end; run += RUN) {
            IntSums sums[T][2] = {};
            for (int64_t c = run; c < std::min(end, run + RUN); c += 2, from += 2 * PANEL, with += 2 * TILE)
#pragma GCC unroll 12
                for (int t = 0; t < T; t++) {
                    sums[t][0] = add_pairs(sums[t][0], with + 2 * t, from);
                    sums[t][1] = add_pairs(sums[t][1], with + 2 * t, from + PANEL);
                }
            const int64_t at = (run - begin) / RUN * PANEL;
#pragma GCC unroll 12
            for (int t = 0; t < T; t++)
                for (int i = 0; i < 2; i++) {
                    const FloatSums factor = load_lanes(factors + at + i * LANES) * rounded[t].scales[begin / STRETCH];
                    FloatSums sum = load_lanes(y + t * PANEL + i * LANES);
                    sum += factor * __builtin_convertvector(sums[t][i], FloatSums);
                    if (FORMAT == INT4) sum += load_lanes(offsets + at + i * LANES) * rounded[t].sums[run / GROUP];
                    store_lanes(y + t * PANEL + i * LANES, sum);
                }
        }
    }

   private:
    // Into `to`, and 2 * PANEL behind it for each two columns.
    static void unpack_sixteen(const Matrix& w, int64_t row, int64_t begin, int64_t end, int16_t* to) {
        const auto put = [&](Ints first, Ints second) {
            memcpy(to, &first, sizeof(first));
            memcpy(to + 2 * WIDTH, &second, sizeof(second));
            to += 2 * PANEL;
        };
        for (int64_t c = begin; w.stretch && c < end; c += 2) {
            Ints pairs[2];
            interleave(sixteen<FORMAT>(w, row, c), sixteen<FORMAT>(w, row, c + 1), pairs);
            put(pairs[0], pairs[1]);
        }
        for (int64_t c = begin; !w.stretch && c < end; c += SIXTEEN) {
            Ints pairs[2][WIDTH];
            for (int64_t i = 0; i < SIXTEEN; i++)
                pairs[i / WIDTH][i % WIDTH] = (Ints)sixteen<FORMAT>(w, std::min(row + i, w.rows - 1), c);
            for (int half = 0; half < 2; half++) transpose(pairs[half]);
            for (int64_t i = 0; i < WIDTH; i++) put(pairs[0][i], pairs[1][i]);
        }
    }

    void scale(const Matrix& w, int64_t row, int64_t group, int64_t at) {
        uint16_t pairs[2 * PANEL];
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t r = std::min(row + i, w.rows - 1);
            const int64_t of_group = w.stretch ? group * w.stretch + r : r * (w.columns / GROUP) + group;
            if (FORMAT == INT8) factors[at + i] = static_cast<const float*>(w.scale)[r];
            else std::copy_n(static_cast<const uint16_t*>(w.scale) + 2 * of_group, 2, pairs + 2 * i);
        }
        for (int64_t i = 0; FORMAT == INT4 && i < PANEL; i += WIDTH) {
            const auto [factor, offset] = eight_pairs(pairs + 2 * i);
            store(factors + at + i, factor);
            store(offsets + at + i, offset);
        }
    }
};
