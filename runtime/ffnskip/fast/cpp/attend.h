// Attention over the cache: heads that share keys and values read and widen them once, and threads may share out the
// positions.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

constexpr int HEADS_AT_ONCE = 3;  // times four sums: more have no room in sixteen registers

struct Scoring {
    float scale, cap;  // cap 0: none
};

// scores[h * stride + t] = q[h] . keys[t] for T keys, 4 or 1.
template <int H, int T, typename Number>
INLINE void score(const float* q, const Number* keys, int64_t size, float* scores, int64_t stride) {
    const int64_t whole = size / WIDTH * WIDTH;
    Floats sums[H][T];
    for (int h = 0; h < H; h++)
        for (int t = 0; t < T; t++) sums[h][t] = Floats{};
    for (int64_t i = 0; i < whole; i += WIDTH)
        for (int t = 0; t < T; t++) {
            const Floats key = load(keys + t * size + i);
            for (int h = 0; h < H; h++) sums[h][t] += key * load(q + h * size + i);
        }
    for (int h = 0; h < H; h++) {
        if constexpr (T == 4) store_sums(scores + h * stride, sums[h][0], sums[h][1], sums[h][2], sums[h][3]);
        else scores[h * stride] = sum(sums[h][0]);
    }
    for (int64_t i = whole; i < size; i++)
        for (int h = 0; h < H; h++)
            for (int t = 0; t < T; t++) scores[h * stride + t] += widened(keys + t * size + i) * q[h * size + i];
}

// What a softmax over some positions leaves open: the highest score, and the sum of exp(score - highest).
struct Softmax {
    float highest = -INFINITY, sum = 0;
};

// Scores to their exponentials.
static Softmax exponentials(Scoring how, int64_t n, float* scores) {
    Softmax of;
    Floats most = spread(-INFINITY), sums = {};
    int64_t t = 0;
    for (; t + WIDTH <= n && how.cap <= 0; t += WIDTH) {
        const Floats score = load(scores + t) * how.scale;
        store(scores + t, score);
        most = score > most ? score : most;
    }
    for (int64_t i = 0; i < WIDTH; i++) of.highest = std::max(of.highest, most[i]);
    for (; t < n; t++) {
        scores[t] *= how.scale;
        if (how.cap > 0) scores[t] = how.cap * std::tanh(scores[t] / how.cap);
        of.highest = std::max(of.highest, scores[t]);
    }
    t = 0;
    for (; t + WIDTH <= n; t += WIDTH) {
        const Floats p = exponential(load(scores + t) - of.highest);
        store(scores + t, p);
        sums += p;
    }
    of.sum = sum(sums);
    for (; t < n; t++) of.sum += scores[t] = std::exp(scores[t] - of.highest);
    return of;
}

// N vectors of y[h] = factors[h] * scores[h] . values.
template <int H, int N, typename Number>
INLINE void mix(const Number* values, int64_t n, int64_t size, const float* scores, int64_t stride,
                const float* factors, float* y) {
    Floats mixed[H][N];
    for (int h = 0; h < H; h++)
        for (int j = 0; j < N; j++) mixed[h][j] = Floats{};
    for (int64_t t = 0; t < n; t++) {
        Floats share[H];
        for (int h = 0; h < H; h++) share[h] = spread(scores[h * stride + t]);
        for (int j = 0; j < N; j++) {
            const Floats v = load(values + t * size + j * WIDTH);
            for (int h = 0; h < H; h++) mixed[h][j] += share[h] * v;
        }
    }
    for (int h = 0; h < H; h++)
        for (int j = 0; j < N; j++) store(y + h * size + j * WIDTH, mixed[h][j] * factors[h]);
}

// Lets the memory bring some numbers near.
template <typename Number>
INLINE void fetch(const Number* from, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE / int64_t(sizeof(Number))) __builtin_prefetch(from + i, 0, 2);
}

// y[h] = softmax(scale * q[h] . keys) . values over n positions, for H heads that lie one behind the other. `scores`
// has room for H times `stride` numbers, which are at least n.
template <int H, typename Number>
static void attend(const float* q, const Number* keys, const Number* values, int64_t n, int64_t size, Scoring how,
                   float* scores, int64_t stride, float* y, Softmax* softmax) {
    constexpr int N = H == 1 ? 8 : 4;
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) {
        fetch(values + t * size, 4 * size);
        score<H, 4>(q, keys + t * size, size, scores + t, stride);
    }
    for (; t < n; t++) score<H, 1>(q, keys + t * size, size, scores + t, stride);
    float factors[H];
    for (int h = 0; h < H; h++) {
        softmax[h] = exponentials(how, n, scores + h * stride);
        factors[h] = n ? 1.0f / softmax[h].sum : 0.0f;
    }
    int64_t i = 0;
    for (; i + N * WIDTH <= size; i += N * WIDTH) mix<H, N>(values + i, n, size, scores, stride, factors, y + i);
    for (; i + WIDTH <= size; i += WIDTH) mix<H, 1>(values + i, n, size, scores, stride, factors, y + i);
    for (; i < size; i++)
        for (int h = 0; h < H; h++) {
            float mixed = 0;
            for (t = 0; t < n; t++) mixed += scores[h * stride + t] * widened(values + t * size + i);
            y[h * size + i] = mixed * factors[h];
        }
}

// The same for any number of heads.
template <typename Number>
static void attend(int64_t heads, const float* q, const Number* keys, const Number* values, int64_t n, int64_t size,
                   Scoring how, float* scores, int64_t stride, float* y, Softmax* softmax) {
    const auto some = [&](auto count, int64_t h) {
        attend<count()>(q + h * size, keys, values, n, size, how, scores, stride, y + h * size, softmax + h);
        return h + count();
    };
    static_assert(HEADS_AT_ONCE == 3);
    int64_t h = 0;
    while (heads - h > 4 || heads - h == 3) h = some(std::integral_constant<int, 3>(), h);
    while (heads - h > 1) h = some(std::integral_constant<int, 2>(), h);
    if (h < heads) some(std::integral_constant<int, 1>(), h);
}

// y = what attention over all positions gives one of `heads` heads, from what it gives over spans of them.
static void combine(int64_t spans, int64_t heads, const float* of_spans, const Softmax* softmax, int64_t size,
                    float* y) {
    Softmax whole;
    for (int64_t i = 0; i < spans; i++) whole.highest = std::max(whole.highest, softmax[i * heads].highest);
    const auto weight = [&](int64_t i) {
        return softmax[i * heads].sum * std::exp(softmax[i * heads].highest - whole.highest);
    };
    for (int64_t i = 0; i < spans; i++) whole.sum += weight(i);
    std::fill_n(y, size, 0.0f);
    for (int64_t i = 0; i < spans; i++) {
        const float factor = weight(i) / whole.sum;
        for (int64_t k = 0; k < size; k++) y[k] += factor * of_spans[i * heads * size + k];
    }
}
