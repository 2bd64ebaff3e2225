// The buffers of a step, which live as long as it does.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "attend.h"
#include "structs.h"

enum Part { ATTENTION, FFN, COMPENSATION, RULE, HEAD, N_PARTS };

static int64_t widest_up(const Model& m) {
    int64_t widest = m.intermediate;
    if (m.rule == PRICE) return widest;
    for (int64_t i = 0; i < m.cold_e - m.cold_s; i++) widest = std::max(widest, m.compensations[i].up.rows);
    return widest;
}

static int64_t widest_last(const Model& m) {
    int64_t widest = 0;
    if (m.rule == PRICE) return widest;
    for (int64_t i = 0; i < m.cold_e - m.cold_s; i++) widest = std::max(widest, m.compensations[i].last.columns);
    return widest;
}

// Inputs and outputs of the largest product whose matrices lie input by input; 0 where none do.
static int64_t widest_input(const Model& m) {
    if (!m.layers[0].q.stretch) return 0;
    return std::max({m.hidden, m.heads * m.head_dim, m.intermediate});
}

static int64_t most_sums(const Model& m) {
    if (!m.layers[0].q.stretch) return 0;
    return std::max({(m.heads + 2 * m.kv_heads) * m.head_dim, m.hidden, 2 * m.intermediate});
}

// Products of the head to logits.
static void finish_logits(const Model& m, int64_t begin, int64_t end, float* logits) {
    for (int64_t i = begin; i < end; i++) {
        logits[i] *= m.logit_scale;
        if (m.logit_cap > 0) logits[i] = m.logit_cap * std::tanh(logits[i] / m.logit_cap);
    }
}

// What all threads share of a step.
struct Shared {
    Shared(const Model& m, const Cache& c, int threads)
        : q(c.batch * m.heads * m.head_dim), k(c.batch * m.kv_heads * m.head_dim), v(k.size()),
          mixed(threads * c.batch * m.heads * m.head_dim), gate(c.batch * m.intermediate), up(c.batch * widest_up(m)),
          added(c.batch * m.hidden), z(c.batch * widest_last(m)), no_limits(widest_input(m)),
          softmax(threads * c.batch * m.heads) {}
    std::vector<float> q, k, v, mixed, gate, up, added, z, no_limits;
    std::vector<Softmax> softmax;  // [threads, batch, heads] as `mixed`: there are no more spans than threads
};

// What each thread has for itself.
struct Scratch {
    Scratch(const Model& m, const Cache& c)
        : h(c.batch * m.hidden), x(c.batch * m.hidden), added(c.batch * m.hidden), f(m.hidden),
          scores(HEADS_AT_ONCE * c.capacity), key(m.head_dim), query(m.heads / m.kv_heads * m.head_dim),
          mixed(c.batch * m.heads * m.head_dim),
          sums{std::vector<float>(c.batch * most_sums(m)), std::vector<float>(c.batch * most_sums(m))} {}
    std::vector<float> h, x, added, f, scores, key, query, mixed;
    std::vector<float> sums[2];  // in turns: while others still read the one, the next product goes into the other
    Kept kept;
};

struct Step {
    Step(const Model& model, const Cache& cache, const Counts& counts, int threads)
        : model(model), cache(cache), counts(counts), shared(model, cache, threads), threads(threads) {
        for (int i = 0; i < threads; i++) scratch.push_back(std::make_unique<Scratch>(model, cache));
    }
    const Model& model;
    const Cache& cache;
    const Counts& counts;
    Shared shared;
    std::vector<std::unique_ptr<Scratch>> scratch;
    int threads;
    double seconds[N_PARTS] = {};
};
