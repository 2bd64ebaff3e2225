// Products with matrices of 8 and of 4 bits, in integers.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "format.h"
#include "halves.h"

// What 64 numbers of a vector are to an int4 product: in the order in which `block_product4` meets them, and the sums of
// those that make one of its eight sums of products.
constexpr int64_t BLOCK = 2 * GROUP;
struct Block {
    float sums[WIDTH];
    int16_t numbers[BLOCK];

    void deal(const int16_t* from) {
        for (int64_t i = 0; i < BLOCK; i++) {
            const int64_t turn = i / 16, lane = i % 16;  // which four bits of each sixteen, and which sixteen
            numbers[i] = from[lane / 8 * GROUP + lane % 8 * 2 + turn / 2 + turn % 2 * (GROUP / 2)];
        }
        for (int64_t k = 0; k < WIDTH; k++) {
            int32_t sum = 0;
            for (int64_t i = 2 * k; i < BLOCK; i += 16) sum += numbers[i] + numbers[i + 1];
            sums[k] = float(sum);
        }
    }
};

// The vectors of such a product, rounded to 16 bits with a scale per stretch of columns: sixteen products at a time, and
// exact. A stretch is too short for their sum to overflow.
constexpr int64_t STRETCH = 256;
struct Rounded {
    std::vector<int16_t> numbers;
    std::vector<float> scales;
    std::vector<Block> blocks;  // beside int4, where rows are read
    std::vector<float> sums;    // of groups, beside int4 that is unpacked

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
        blocks.resize(numbers.size() / BLOCK);
        for (size_t i = 0; i < blocks.size(); i++) blocks[i].deal(&numbers[i * BLOCK]);
    }

    void add_up() {
        sums.resize(numbers.size() / GROUP);
        for (size_t i = 0; i < sums.size(); i++) {
            const int16_t* group = &numbers[i * GROUP];
            sums[i] = float(std::accumulate(group, group + GROUP, 0)) * scales[i * GROUP / STRETCH];
        }
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

// Adds up two groups' products with a block of each of T vectors: the one group makes the first four of eight sums, the
// other the last four. A group's numbers are factor * n + offset with n of 4 bits.
template <int T>
INLINE void block_product4(const uint8_t* data, const uint16_t* scale, const Block* const (&x)[T],
                           Floats (&factors)[T], Floats (&offsets)[T]) {
    const Words four = load_words(data);
    const auto [factor, offset] = two_pairs(scale);
    for (int t = 0; t < T; t++) {
        const int16_t* with = x[t]->numbers;
        Ints sums = {};
        sums = add_products(sums, (Shorts)(four & 15), with);
        sums = add_products(sums, (Shorts)(four >> 4 & 15), with + 16);
        sums = add_products(sums, (Shorts)(four >> 8 & 15), with + 32);
        sums = add_products(sums, (Shorts)(four >> 12), with + 48);
        factors[t] += factor * __builtin_convertvector(sums, Floats);
        offsets[t] += offset * load(x[t]->sums);
    }
}

template <int T>
INLINE void row_product4(const Matrix& w, int64_t row, const Rounded* x, float* const* y) {
    constexpr int64_t BYTES = BLOCK / 2, SCALES = 2 * BLOCK / GROUP;
    const int64_t groups = w.columns / GROUP, whole = w.columns / BLOCK;
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + row * w.columns / 2;
    const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + row * groups * 2;
    const Block* with[T];
    for (int t = 0; t < T; t++) with[t] = x[t].blocks.data();
    Floats totals[T] = {};
    for (int64_t begin = 0; begin < whole; begin += STRETCH / BLOCK) {
        Floats factors[T] = {}, offsets[T] = {};
        const int64_t end = std::min(whole, begin + STRETCH / BLOCK);
        for (int64_t i = begin; i < end; i++, data += BYTES, scale += SCALES) {
            block_product4<T>(data, scale, with, factors, offsets);
            for (int t = 0; t < T; t++) with[t]++;
        }
        for (int t = 0; t < T; t++) totals[t] += (factors[t] + offsets[t]) * x[t].scales[begin * BLOCK / STRETCH];
    }
    if (groups % 2) {  // the last group has no other beside it
        uint8_t numbers[BYTES] = {};
        uint16_t scales[SCALES] = {};
        std::copy_n(data, BYTES / 2, numbers);
        std::copy_n(scale, SCALES / 2, scales);
        Floats factors[T] = {}, offsets[T] = {};
        block_product4<T>(numbers, scales, with, factors, offsets);
        for (int t = 0; t < T; t++) totals[t] += (factors[t] + offsets[t]) * x[t].scales.back();
    }
    for (int t = 0; t < T; t++) y[t][row] = sum(totals[t]) + (w.bias ? w.bias[row] : 0.0f);
}
