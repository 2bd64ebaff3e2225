// Products with matrices that lie input by input: for each input one stretch with the weights of all outputs that read
// it. An input that is left out is a stretch that is not read.
#pragma once

#include "inputs4.h"
#include "kept.h"

// y += x[0] * w[0] + x[1] * w[1] + ... of `N` inputs; meanwhile the stretches `next` are brought near, line by line.
// Without that, a stretch ends before the processor has noticed that it is read in order. They are brought into the
// second cache: more lines can be under way to it than to the first, and memory answers slowly.
template <int N, typename Number>
INLINE void add_inputs(const Number* const* w, const Number* const* next, const float* x, int64_t n, float* y) {
    constexpr int64_t STEP = LINE / sizeof(Number);
    Floats factor[N];
    for (int k = 0; k < N; k++) factor[k] = spread(x[k]);
    const auto eight = [&](int64_t i) {
        Floats total = load(y + i);
        for (int k = 0; k < N; k++) total += factor[k] * load(w[k] + i);
        store(y + i, total);
    };
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        if (next)
            for (int k = 0; k < N; k++) __builtin_prefetch(next[k] + i, 0, 2);
        for (int64_t j = 0; j < STEP; j += WIDTH) eight(i + j);
    }
    for (; i + WIDTH <= n; i += WIDTH) eight(i);
    for (; i < n; i++)
        for (int k = 0; k < N; k++) y[i] += x[k] * widened(w[k] + i);
}

// y[t * n ..] = the sum over kept inputs [begin, end) of value * stretch, for `n` outputs of `vectors` vectors.
template <int N, typename Number>
static void sum_inputs(const Number* data, int64_t stretch, const Kept& kept, int64_t begin, int64_t end, int vectors,
                       int64_t n, float* y) {
    std::fill(y, y + vectors * n, 0.0f);
    const Number *now[N], *next[N];
    const Number* const* none = nullptr;
    for (int64_t at = begin; at < end; at += N) {
        const bool more = N > 1 && at + N < end;
        for (int k = 0; k < N; k++) {
            now[k] = data + kept.index[at + k] * stretch;
            if (more) next[k] = data + kept.index[at + N + k] * stretch;
        }
        add_inputs<N>(now, more ? next : none, kept.of(0) + at, n, y);
        for (int t = 1; t < vectors; t++)  // from the first cache
            add_inputs<N>(now, none, kept.of(t) + at, n, y + t * n);
    }
}

// All but a few of short stretches, one behind the other, are best read as what they are, one sequence; the processor
// then runs ahead by itself. Where more is left out, or stretches are long, several at a time are faster.
template <typename Number>
static void sum_inputs(const Matrix& w, const Kept& kept, int64_t begin, int64_t end, int vectors, int64_t n,
                       float* y) {
    constexpr int64_t SHORT = 2048;  // bytes
    const Number* data = static_cast<const Number*>(w.data);
    const bool in_sequence = n * int64_t(sizeof(Number)) <= SHORT && 100 * kept.n > 98 * w.columns;
    if (in_sequence) sum_inputs<1>(data, w.stretch, kept, begin, end, vectors, n, y);
    else sum_inputs<AT_ONCE>(data, w.stretch, kept, begin, end, vectors, n, y);
}

static void sum_inputs(const Matrix& w, const Kept& kept, int64_t begin, int64_t end, int vectors, int64_t n,
                       float* y) {
    switch (w.format) {
        case FLOAT32: return sum_inputs<float>(w, kept, begin, end, vectors, n, y);
        case BFLOAT16: return sum_inputs<uint16_t>(w, kept, begin, end, vectors, n, y);
        case INT8: return sum_inputs<int8_t>(w, kept, begin, end, vectors, n, y);
        case INT4: return sum_inputs4(w, kept, begin, end, vectors, n, y);
    }
}
