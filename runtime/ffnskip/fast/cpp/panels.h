// Sixteen rows of a matrix, some of their columns, unpacked: what a product with many vectors reads again and again.
// Numbers lie column by column, integers by pairs of columns, so that each of eight sums is that of another row.
#pragma once

#include <algorithm>

#include "integers.h"
#include "inputs4.h"

constexpr int64_t PANEL = 16;  // rows

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
    int16_t mixed[2 * PANEL];
    for (int i = 0; i < PANEL; i++) {
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
    using Vector = const float*;
    static constexpr int64_t DEPTH = 256;  // columns
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

    // y[t] += the product of the columns from `begin` to `end` with x[t], for T vectors.
    template <int T>
    void multiply(int64_t begin, int64_t end, const Vector* x, float* y) const {
        Floats sums[T][2];
        const float *from = numbers, *with[T];
        for (int t = 0; t < T; t++) {
            with[t] = x[t];
            for (int i = 0; i < 2; i++) sums[t][i] = load(y + t * PANEL + i * WIDTH);
        }
        for (int64_t c = begin; c < end; c++, from += PANEL) {
            const Floats first = load(from), second = load(from + WIDTH);
            for (int t = 0; t < T; t++) {
                const Floats factor = spread(with[t][c]);
                sums[t][0] += factor * first;
                sums[t][1] += factor * second;
            }
        }
        for (int t = 0; t < T; t++)
            for (int i = 0; i < 2; i++) store(y + t * PANEL + i * WIDTH, sums[t][i]);
    }
};

// Sixteen numbers of a row from column `c` on, or sixteen rows of a column.
template <Format FORMAT>
INLINE Shorts sixteen(const Matrix& w, int64_t row, int64_t c) {
    if (FORMAT == INT8) {
        int8_t room[PANEL];
        return widen16(locate<PANEL>(w, row, c, room));
    }
    const uint8_t* data = static_cast<const uint8_t*>(w.data);
    const int64_t half = w.stretch ? ROWS / 2 : GROUP / 2, at = w.stretch ? row : c;  // the two numbers of a byte
    data += (w.stretch ? c * w.stretch : row * w.columns) / 2 + at / (2 * half) * half + at % half;
    return nibbles(data, at / half % 2);
}

template <Format FORMAT>
struct IntegerPanel {
    using Vector = Rounded;
    static constexpr int64_t DEPTH = STRETCH;  // columns, whose numbers in a vector have one scale
    static constexpr int64_t RUN = FORMAT == INT4 ? GROUP : STRETCH;  // columns, whose numbers in a row have one factor
    int16_t numbers[DEPTH * PANEL];
    float factors[DEPTH / RUN * PANEL], offsets[DEPTH / RUN * PANEL];

    void unpack(const Matrix& w, int64_t row, int64_t begin, int64_t end) {
        int16_t* to = numbers;
        const auto put = [&](Ints pairs) {
            memcpy(to, &pairs, sizeof(pairs));
            to += PANEL;
        };
        for (int64_t c = begin; w.stretch && c < end; c += 2) {
            Ints pairs[2];
            interleave(sixteen<FORMAT>(w, row, c), sixteen<FORMAT>(w, row, c + 1), pairs);
            for (int half = 0; half < 2; half++) put(pairs[half]);
        }
        for (int64_t c = begin; !w.stretch && c < end; c += PANEL) {
            Ints pairs[2][WIDTH];
            for (int64_t i = 0; i < PANEL; i++)
                pairs[i / WIDTH][i % WIDTH] = (Ints)sixteen<FORMAT>(w, std::min(row + i, w.rows - 1), c);
            for (int half = 0; half < 2; half++) transpose(pairs[half]);
            for (int64_t i = 0; i < PANEL; i++) put(pairs[i % 2][i / 2]);
        }
        for (int64_t c = begin; c < end; c += RUN) scale(w, row, c / GROUP, (c - begin) / RUN * PANEL);
    }

    // y[t] += the product of the columns from `begin` to `end` with x[t], for T vectors.
    template <int T>
    void multiply(int64_t begin, int64_t end, const Vector* x, float* y) const {
        const int16_t *from = numbers, *with[T];
        for (int t = 0; t < T; t++) with[t] = x[t].numbers.data();
        for (int64_t run = begin; run < end; run += RUN) {
            Ints sums[T][2] = {};
            for (int64_t c = run; c < std::min(end, run + RUN); c += 2, from += 2 * PANEL)
                for (int t = 0; t < T; t++) {
                    const Shorts two = spread_pair(with[t] + c);
                    sums[t][0] = add_products(sums[t][0], two, from);
                    sums[t][1] = add_products(sums[t][1], two, from + PANEL);
                }
            const int64_t at = (run - begin) / RUN * PANEL;
            for (int t = 0; t < T; t++)
                for (int64_t i = 0; i < PANEL; i += WIDTH) {
                    const Floats factor = load(factors + at + i) * x[t].scales[begin / STRETCH];
                    Floats sum = load(y + t * PANEL + i) + factor * __builtin_convertvector(sums[t][i / WIDTH], Floats);
                    if (FORMAT == INT4) sum += load(offsets + at + i) * x[t].sums[run / GROUP];
                    store(y + t * PANEL + i, sum);
                }
        }
    }

   private:
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
