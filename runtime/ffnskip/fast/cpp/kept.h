// Which inputs of a product are kept.
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
        stride_ = width + WIDTH + AT_ONCE;
        index.resize(stride_);
        values.resize(stride_ * vectors);
        for (int t = 0; t < vectors; t++) left_out[t] = 0;
        n = 0;
        int64_t i = 0;
        for (; i + WIDTH <= width; i += WIDTH) {
            uint32_t any = 0;
            Floats kept[MAX_BATCH];
            for (int t = 0; t < vectors; t++) {
                const Floats value = load(x[t] + i);
                const Ints keep = ~(magnitude(value) < load(limit[t] + i));  // what is not a number is kept
                const uint32_t bits = signs(keep);
                kept[t] = (Floats)((Ints)value & keep);
                left_out[t] += WIDTH - __builtin_popcount(bits);
                any |= bits;
            }
            const Ints order = front(any);
            Ints indices = order + int32_t(i);
            memcpy(&index[n], &indices, sizeof(indices));
            for (int t = 0; t < vectors; t++) store(&values[t * stride_ + n], pick(kept[t], order));
            n += __builtin_popcount(any);
        }
        for (; i < width; i++) {
            bool any = false;
            for (int t = 0; t < vectors; t++) {
                const bool keep = !(std::fabs(x[t][i]) < limit[t][i]);
                values[t * stride_ + n] = keep ? x[t][i] : 0.0f;
                left_out[t] += !keep;
                any |= keep;
            }
            index[n] = int32_t(i);
            n += any;
        }
        for (const int32_t last = n ? index[n - 1] : 0; n % AT_ONCE; n++) {
            index[n] = last;
            for (int t = 0; t < vectors; t++) values[t * stride_ + n] = 0.0f;
        }
    }

    const float* of(int t) const { return values.data() + t * stride_; }

   private:
    int64_t stride_ = 0;
};
