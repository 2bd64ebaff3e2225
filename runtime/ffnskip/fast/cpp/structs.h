// What Python hands over. ffnskip/fast/structs.py mirrors these structs and Matrix, ffnskip/fast/codes.py the
// enumerations.
#pragma once

#include <cstring>

#include "blocks.h"
#include "matrix.h"

struct Layer {
    Matrix q, k, v, out, gate, up, down;
    // Null where there is none.
    const float *norm_attention, *norm_ffn, *after_attention, *after_ffn, *q_norm, *k_norm;
    int64_t window;  // 0: all positions
    const float *cos, *sin;
};

struct Compensation {
    const float* probe;
    float probe_bias;
    // Added is `last` [z; a] + bias with z = `first` x, or x itself; a are the activations of a few neurons.
    Matrix first, gate, up, last;
    const float* bias;
};

enum Rule : int32_t { NEVER, COSINE, PREDICTED_DAMAGE };

struct Model {
    int64_t n_layers, hidden, intermediate, heads, kv_heads, head_dim, rotary;
    float eps, attention_scale, attention_cap, logit_cap, embedding_scale;
    Activation activation;
    const Layer* layers;
    Matrix embedding, head;
    const float* norm;
    Rule rule;
    float threshold;
    int64_t reach, cold_s, cold_e;
    const Compensation* compensations;
};

struct Cache {  // [layers, batch, kv_heads, capacity, head_dim]
    void *keys, *values;
    const int64_t* starts;
    int64_t batch, capacity;
    Format format;
};

struct Counts {  // per layer; never_skipped is one number
    int64_t *skipped, *checked, *first_skipped, *never_skipped;
};

struct Input {
    const int64_t* tokens;
    int64_t slot;
    const uint8_t *ended, *counted, *allowed;
    float* logits;
};

// How many bytes the struct of that name has, -1 where there is none; Python compares them with its mirrors.
static int64_t size_of(const char* name) {
    struct Size {
        const char* name;
        int64_t size;
    };
    const Size sizes[] = {
        {"Matrix", sizeof(Matrix)}, {"Layer", sizeof(Layer)}, {"Compensation", sizeof(Compensation)},
        {"Model", sizeof(Model)},   {"Cache", sizeof(Cache)}, {"Counts", sizeof(Counts)},
        {"Input", sizeof(Input)},
    };
    for (const Size& known : sizes)
        if (!std::strcmp(known.name, name)) return known.size;
    return -1;
}
