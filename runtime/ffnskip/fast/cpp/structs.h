// What Python hands over. ffnskip/fast/structs.py mirrors these structs and Matrix, ffnskip/fast/codes.py the
// enumerations.
#pragma once

#include <cstring>

#include "blocks.h"
#include "inputs.h"
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

enum Role { ATTENTION_INPUT, ATTENTION_OUTPUT, FFN_INPUT, NEURONS, N_ROLES };

struct Parts {  // of one layer: the magnitudes under which inputs are left out
    const float* limits[N_ROLES];
};

enum Rule : int32_t { NEVER, COSINE, PREDICTED_DAMAGE, PRICE };

struct Model {
    int64_t n_layers, hidden, intermediate, heads, kv_heads, head_dim, rotary;
    float eps, attention_scale, attention_cap, logit_cap, embedding_scale, residual_scale, logit_scale;
    int32_t norm_across_heads;  // q_norm and k_norm are of all heads together, as OLMo 2 has them
    Activation activation;
    const Layer* layers;
    Matrix embedding, head;
    const float* norm;
    Rule rule;
    float threshold;
    int64_t reach, cold_s, cold_e;
    const Compensation* compensations;  // of the rules that skip FFNs
    const Parts* parts;                 // of the rule `price`
    double shares[N_ROLES];             // of an FFN's FLOPs, that one input is
};

struct Cache {  // [layers, batch, kv_heads, capacity, head_dim]
    void *keys, *values;
    const int64_t* starts;
    int64_t batch, capacity;
    Format format;
};

struct Counts {  // per layer, left_out also per role; never_skipped and least are one number
    int64_t *skipped, *checked, *first_skipped, *never_skipped, *left_out;
    double* least;
};

struct Input {
    const int64_t* tokens;
    int64_t slot;
    const uint8_t *ended, *counted, *allowed;
    float* logits;
};

struct Chunk {  // of prompts: tokens of some rows, each row's one behind the other
    const int64_t *tokens, *rows, *slots;
    int64_t n, last;  // the slot behind which logits are wanted, [batch, vocabulary]
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
        {"Input", sizeof(Input)},   {"Parts", sizeof(Parts)}, {"Chunk", sizeof(Chunk)},
    };
    for (const Size& known : sizes)
        if (!std::strcmp(known.name, name)) return known.size;
    return -1;
}
