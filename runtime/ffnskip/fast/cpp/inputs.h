// Products with matrices that lie input by input: for each input one stretch with the weights of all outputs that read
// it. An input that is left out is a stretch that is not read.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "matrix.h"

constexpr int AT_ONCE = 4;  // inputs per pass over the sums, which are read and written in each

// The inputs that at least one of some vectors keeps.
struct Kept {
    int64_t n = 0;  // a multiple of AT_ONCE: the last are repeated with zeros
    std::vector<int32_t> index;
    std::vector<float> values;  // [vectors, width]; zero for a vector that leaves the input out

    // An input is left out of vector t where its magnitude is under limit[t]; left_out[t] counts them. `Count` is the
    // number of vectors, a compile-time constant where it is one, which is worth a loop of its own.
    template <typename Count>
    void list(Count vectors, const float* const* x, const float* const* limit, int64_t width, int64_t* left_out) {
        const int64_t room = (width + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
        stride_ = room;
        index.resize(room);
        values.resize(room * vectors);
        int64_t count = 0;
        for (int t = 0; t < vectors; t++) left_out[t] = 0;
        for (int64_t i = 0; i < width; i++) {
            bool any = false;
            for (int t = 0; t < vectors; t++) {
                const float value = x[t][i];
                const bool keep = !(std::fabs(value) < limit[t][i]);  // what is not a number is kept
                values[t * room + count] = keep ? value : 0.0f;
                left_out[t] += !keep;
                any |= keep;
            }
            index[count] = int32_t(i);
            count += any;
        }
        for (n = count; n % AT_ONCE; n++) {
            index[n] = index[count - 1];
            for (int t = 0; t < vectors; t++) values[t * room + n] = 0.0f;
        }
    }

    const float* of(int t) const { return values.data() + t * stride_; }

   private:
    int64_t stride_ = 0;
};

// y += x[0] * w[0] + x[1] * w[1] + ...; meanwhile the stretches `next` are brought near, line by line. Without that, a
// stretch ends before the processor has noticed that it is read in order.
template <typename Number>
INLINE void add_inputs(const Number* const* w, const Number* const* next, const float* x, int64_t n, float* y) {
    constexpr int64_t LINE = 64 / sizeof(Number);
    Floats factor[AT_ONCE];
    for (int k = 0; k < AT_ONCE; k++) factor[k] = spread(x[k]);
    const auto eight = [&](int64_t i) {
        Floats total = load(y + i);
        for (int k = 0; k < AT_ONCE; k++) total += factor[k] * load(w[k] + i);
        store(y + i, total);
    };
    int64_t i = 0;
    for (; i + LINE <= n; i += LINE) {
        if (next)
            for (int k = 0; k < AT_ONCE; k++) __builtin_prefetch(next[k] + i);
        for (int64_t j = 0; j < LINE; j += WIDTH) eight(i + j);
    }
    for (; i + WIDTH <= n; i += WIDTH) eight(i);
    for (; i < n; i++)
        for (int k = 0; k < AT_ONCE; k++) y[i] += x[k] * widened(w[k] + i);
}

// y[t * n ..] = the sum over kept inputs [begin, end) of value * stretch, for `n` outputs of `vectors` vectors.
template <typename Number>
static void sum_inputs(const Number* data, int64_t stretch, const Kept& kept, int64_t begin, int64_t end, int vectors,
                       int64_t n, float* y) {
    std::fill(y, y + vectors * n, 0.0f);
    const Number *now[AT_ONCE], *next[AT_ONCE];
    for (int64_t at = begin; at < end; at += AT_ONCE) {
        const bool more = at + AT_ONCE < end;
        for (int k = 0; k < AT_ONCE; k++) {
            now[k] = data + kept.index[at + k] * stretch;
            next[k] = more ? data + kept.index[at + AT_ONCE + k] * stretch : nullptr;
        }
        add_inputs(now, more ? next : nullptr, kept.of(0) + at, n, y);
        for (int t = 1; t < vectors; t++)  // from the first cache
            add_inputs(now, static_cast<const Number* const*>(nullptr), kept.of(t) + at, n, y + t * n);
    }
}

static void sum_inputs(const Matrix& w, const Kept& kept, int64_t begin, int64_t end, int vectors, int64_t n,
                       float* y) {
    switch (w.format) {
        case FLOAT32: return sum_inputs(static_cast<const float*>(w.data), w.stretch, kept, begin, end, vectors, n, y);
        case BFLOAT16:
            return sum_inputs(static_cast<const uint16_t*>(w.data), w.stretch, kept, begin, end, vectors, n, y);
        case INT8: return sum_inputs(static_cast<const int8_t*>(w.data), w.stretch, kept, begin, end, vectors, n, y);
        case INT4: return;  // refused by fast/parts.py: two of its numbers share a byte
    }
}
