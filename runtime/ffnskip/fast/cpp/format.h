// How a weight matrix is stored.
#pragma once

#include <cstdint>

constexpr int MAX_BATCH = 16;  // vectors that one product may take

enum Format : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };  // integers behind floats
constexpr int64_t GROUP = 32;  // columns of an int4 matrix that share a factor and an offset

struct Matrix {  // `data` is null where there is none
    const void* data;
    const void* scale;
    const float* bias;
    int64_t rows, columns;
    int64_t stretch;  // numbers from one column to the next where columns lie one behind the other; 0: rows do
    Format format;
};
