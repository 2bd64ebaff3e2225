// The parts of a decoder layer that read no weight matrices.
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

struct Scores {
    float scale, cap;  // cap 0: none
};

// N vectors of y = factor * scores . [values; value]: side by side, so that the rows of values are read in few passes.
template <int N, typename Number>
INLINE void mix(const Number* values, const float* value, int64_t n, int64_t size, const float* scores, float factor,
                float* y) {
    Floats mixed[N];
    for (int j = 0; j < N; j++) mixed[j] = scores[n] * load(value + j * WIDTH);
    for (int64_t t = 0; t < n; t++)
        for (int j = 0; j < N; j++) mixed[j] += scores[t] * load(values + t * size + j * WIDTH);
    for (int j = 0; j < N; j++) store(y + j * WIDTH, mixed[j] * factor);
}

// y = softmax(scale * q . [keys; key]) . [values; value] over `n` cached positions and the current one.
template <typename Number>
static void attend(const float* q, const Number* keys, const Number* values, const float* key, const float* value,
                   int64_t n, int64_t size, Scores how, float* scores, float* y) {
    for (int64_t t = 0; t < n; t++) scores[t] = dot(keys + t * size, q, size);
    scores[n] = dot(key, q, size);
    float highest = -INFINITY;
    for (int64_t t = 0; t <= n; t++) {
        scores[t] *= how.scale;
        if (how.cap > 0) scores[t] = how.cap * std::tanh(scores[t] / how.cap);
        highest = std::max(highest, scores[t]);
    }
    float total = 0;
    int64_t t = 0;
    for (; t + WIDTH <= n + 1; t += WIDTH) {
        const Floats p = exponential(load(scores + t) - highest);
        store(scores + t, p);
        total += sum(p);
    }
    for (; t <= n; t++) total += scores[t] = std::exp(scores[t] - highest);
    const float inverse = 1.0f / total;
    int64_t i = 0;
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH) mix<4>(values + i, value + i, n, size, scores, inverse, y + i);
    for (; i + WIDTH <= size; i += WIDTH) mix<1>(values + i, value + i, n, size, scores, inverse, y + i);
    for (; i < size; i++) {
        float mixed = scores[n] * value[i];
        for (t = 0; t < n; t++) mixed += scores[t] * widened(values + t * size + i);
        y[i] = mixed * inverse;
    }
}
