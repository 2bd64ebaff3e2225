// Products with matrices of 8 and of 4 bits, in integers.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "format.h"
#include "halves.h"

// Two groups of an int4 matrix lie in one vector, from which `block_sums4` takes four bits of each sixteen at a time.
constexpr int64_t BLOCK = 2 * GROUP;

// The 64 numbers that meet them, in that order.
INLINE void deal_block(const int16_t* from, int16_t* to) {
    for (int64_t i = 0; i < BLOCK; i++) {
        const int64_t turn = i / 16, lane = i % 16;  // which four bits, and of which sixteen
        to[i] = from[lane / 8 * GROUP + lane % 8 * 2 + turn / 2 + turn % 2 * (GROUP / 2)];
    }
}

// A vector of a product in integers, rounded to 16 bits with a scale per stretch of columns: sixteen products at a
// time, and exact. A stretch is too short for their sum to overflow.
constexpr int64_t STRETCH = 256;
struct Rounded {
    std::vector<int16_t> numbers;
    std::vector<float> scales;
    std::vector<int16_t> dealt;       // beside int4, where rows are read: block by block
    std::vector<float> beside_pairs;  // there, too: 0 beside each group's factor, and its sum beside the offset
    std::vector<float> sums;          // of groups, beside int4 that is unpacked

    void round(const float* x, int64_t n) {
        numbers.assign((n + BLOCK - 1) / BLOCK * BLOCK, 0);
        scales.resize((n + STRETCH - 1) / STRETCH);
        for (int64_t begin = 0; begin < n; begin += STRETCH) {
            const int64_t end = std::min(n, begin + STRETCH), whole = begin + (end - begin) / WIDTH * WIDTH;
            const float largest = largest_of(x + begin, end - begin);
            const bool finite = largest <= 3e38f;
            scales[begin / STRETCH] = finite ? largest / 32767 : NAN;
            if (!finite) continue;  // the product is not a number, whatever the integers are
            const float factor = 32767 / largest;
            for (int64_t i = begin; i < whole; i += WIDTH)
                to_integers(rounded_to_whole(load(x + i) * factor), &numbers[i]);
            for (int64_t i = whole; i < end; i++) numbers[i] = int16_t(std::nearbyint(x[i] * factor));
        }
    }

    void deal() {
        dealt.resize(numbers.size());
        for (size_t i = 0; i < numbers.size(); i += BLOCK) deal_block(&numbers[i], &dealt[i]);
        const size_t groups = numbers.size() / GROUP;
        beside_pairs.assign(2 * groups + WIDTH / 2, 0.0f);  // two blocks' are loaded, of which there may be one
        for (size_t i = 0; i < groups; i++) beside_pairs[2 * i + 1] = float(sum_of_group(i));
    }

    void add_up() {
        sums.resize(numbers.size() / GROUP);
        for (size_t i = 0; i < sums.size(); i++) sums[i] = float(sum_of_group(i)) * scales[i * GROUP / STRETCH];
    }

    int32_t sum_of_group(size_t i) const {
        return std::accumulate(&numbers[i * GROUP], &numbers[i * GROUP] + GROUP, 0);
    }
};

// What `n` vectors of `columns` numbers are to products with matrices of a format, or with those of several formats the
// last of these; null for floats. Good until this thread's next.
static const Rounded* rounded(Format format, int64_t columns, int n, const float* const* x) {
    static thread_local std::vector<Rounded> vectors(MAX_BATCH);
    if (format < INT8) return nullptr;
    for (int t = 0; t < n; t++) {
        vectors[t].round(x[t], columns);
        if (format == INT4) vectors[t].deal();
    }
    return vectors.data();
}

template <int T>
INLINE void row_product8(const Matrix& w, int64_t row, const Rounded* x, float* const* y) {
    constexpr int64_t STEP = 4 * WIDTH;
    const int8_t* data = static_cast<const int8_t*>(w.data) + row * w.columns;
    const int64_t whole = w.columns / STEP * STEP;
    const int16_t* with[T];
    for (int t = 0; t < T; t++) with[t] = x[t].numbers.data();
    Floats sums[T] = {};
    for (int64_t begin = 0; begin < whole; begin += STRETCH) {
        const int64_t end = std::min(whole, begin + STRETCH);
        Ints even[T] = {}, odd[T] = {};
        for (int64_t c = begin; c < end; c += STEP) {
            __builtin_prefetch(data + c + ROW_AHEAD);
            const Shorts first = widen16(data + c), second = widen16(data + c + STEP / 2);
            for (int t = 0; t < T; t++) {
                even[t] = add_products(even[t], first, with[t] + c);
                odd[t] = add_products(odd[t], second, with[t] + c + STEP / 2);
            }
        }
        for (int t = 0; t < T; t++)
            sums[t] += __builtin_convertvector(even[t] + odd[t], Floats) * x[t].scales[begin / STRETCH];
    }
    for (int t = 0; t < T; t++) {
        int32_t rest = 0;
        for (int64_t c = whole; c < w.columns; c++) rest += data[c] * with[t][c];
        const float total = sum(sums[t]) + float(rest) * x[t].scales.back();
        y[t][row] = total * static_cast<const float*>(w.scale)[row] + (w.bias ? w.bias[row] : 0.0f);
    }
}

// Eight sums of products of the four bits of two groups: the one group makes the first four, the other the last four.
INLINE Ints block_sums4(Words four, const int16_t* with) {
    Ints sums = {};
    sums = add_products(sums, (Shorts)(four & 15), with);
    sums = add_products(sums, (Shorts)(four >> 4 & 15), with + 16);
    sums = add_products(sums, (Shorts)(four >> 8 & 15), with + 32);
    return add_products(sums, (Shorts)(four >> 12), with + 48);
}

// Adds up the products of one or two blocks with T vectors, from their column `c` on, in units of these. A group's
// numbers are factor * n + offset with n of 4 bits. Offsets are multiplied where they lie, beside the factors.
template <int BLOCKS, int T>
INLINE void add_blocks4(const uint8_t* data, const uint16_t* pairs, const Rounded* x, int64_t c, Floats (&factors)[T],
                        Floats (&offsets)[T]) {
    const Floats both = load_halves<BLOCKS * WIDTH / 2>(pairs);
    for (int i = 0; i < BLOCKS; i++) {
        const Words four = load_words(data + i * BLOCK / 2);
        const Floats factor = spread_two(both, 4 * i, 4 * i + 2);
        for (int t = 0; t < T; t++) {
            const Ints products = block_sums4(four, &x[t].dealt[c + i * BLOCK]);
            factors[t] += factor * __builtin_convertvector(products, Floats);
        }
    }
    for (int t = 0; t < T; t++) offsets[t] += both * load(&x[t].beside_pairs[2 * c / GROUP]);
}

template <int T>
INLINE void row_product4(const Matrix& w, int64_t row, const Rounded* x, float* const* y) {
    const int64_t columns = w.columns, whole = columns / BLOCK * BLOCK;
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + row * columns / 2;
    const uint16_t* pairs = static_cast<const uint16_t*>(w.scale) + row * columns / GROUP * 2;
    Floats totals[T] = {};
    int64_t c = 0;
    for (; c + STRETCH <= columns; c += STRETCH, data += STRETCH / 2, pairs += STRETCH / GROUP * 2) {
        Floats factors[T] = {}, offsets[T] = {};
        for (int64_t i = 0; i < STRETCH; i += 2 * BLOCK) {
            __builtin_prefetch(data + i / 2 + ROW_AHEAD);
            add_blocks4<2, T>(data + i / 2, pairs + i / GROUP * 2, x, c + i, factors, offsets);
        }
        for (int t = 0; t < T; t++) totals[t] += (factors[t] + offsets[t]) * x[t].scales[c / STRETCH];
    }
    if (c < columns) {
        Floats factors[T] = {}, offsets[T] = {};
        for (; c < whole; c += BLOCK, data += BLOCK / 2, pairs += BLOCK / GROUP * 2) {
            __builtin_prefetch(data + ROW_AHEAD);
            add_blocks4<1, T>(data, pairs, x, c, factors, offsets);
        }
        if (whole < columns) {  // the last group has no other beside it
            uint8_t numbers[BLOCK / 2] = {};
            uint16_t pair[BLOCK / GROUP * 2] = {};
            std::copy_n(data, GROUP / 2, numbers);
            std::copy_n(pairs, 2, pair);
            add_blocks4<1, T>(numbers, pair, x, whole, factors, offsets);
        }
        for (int t = 0; t < T; t++) totals[t] += (factors[t] + offsets[t]) * x[t].scales.back();
    }
    for (int t = 0; t < T; t++) y[t][row] = sum(totals[t]) + (w.bias ? w.bias[row] : 0.0f);
}
