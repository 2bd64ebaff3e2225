// The parts of a decoder layer that read no weight matrices, but for attention itself (attend.h).
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

enum Activation : int32_t { SILU, GELU, GELU_TANH };

// y = x / rms(x) * weight, or x where there is no weight; y may be x.
static void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
    if (!weight) {
        std::copy_n(x, n, y);
        return;
    }
    const float factor = 1.0f / std::sqrt(dot(x, x, n) / n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

// The same for one of some heads that lie side by side in `x`; their norm may be one across all of them.
static void norm_head(const float* x, int64_t head, int64_t heads, int64_t size, const float* weight, bool across,
                      float eps, float* y) {
    if (!weight || !across) return rms_norm(x + head * size, weight, eps, size, y);
    const float factor = 1.0f / std::sqrt(dot(x, x, heads * size) / (heads * size) + eps);
    for (int64_t i = head * size; i < (head + 1) * size; i++) *y++ = x[i] * factor * weight[i];
}

// gate = activation(gate) * up
static void activate(Activation kind, float* gate, const float* up, int64_t n) {
    int64_t i = 0;
    if (kind == SILU)
        for (; i + WIDTH <= n; i += WIDTH) {
            const Floats x = load(gate + i);
            store(gate + i, x / (1.0f + exponential(-x)) * load(up + i));
        }
    if (kind == GELU_TANH)  // 1 + tanh(z) = 2 / (1 + exp(-2 z))
        for (; i + WIDTH <= n; i += WIDTH) {
            const Floats x = load(gate + i), z = (x + x * x * x * 0.044715f) * 0.797884561f;
            store(gate + i, x / (1.0f + exponential(-2.0f * z)) * load(up + i));
        }
    for (; i < n; i++) {
        const float x = gate[i];
        float a = 0.5f * x * (1.0f + std::erf(x * 0.707106781f));
        if (kind == SILU) a = x / (1.0f + std::exp(-x));
        if (kind == GELU_TANH) a = 0.5f * x * (1.0f + std::tanh(0.797884561f * (x + 0.044715f * x * x * x)));
        gate[i] = a * up[i];
    }
}

// Turns the first `rotary` numbers of a head, pairs being half of that apart.
static void rotate(float* head, const float* cos, const float* sin, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}
