// One decode step: every row of a batch goes one token further. See ffnskip/fast/native.py, which mirrors the structs.
//
// All threads walk through all layers together. What is small (norms, decisions) each computes for itself, from the same
// numbers to the same result, into memory of its own; what reads weights is shared out by rows, with a barrier behind it.
#include <chrono>
#include <memory>
#include <vector>

#include "blocks.h"
#include "matrix.h"
#include "team.h"

#ifdef _OPENMP
#include <omp.h>
#endif

extern "C" {

struct Layer {
    Matrix q, k, v, out, gate, up, down;
    const float *norm_attention, *norm_ffn, *after_attention, *after_ffn, *q_norm, *k_norm;  // null: there is none
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
}

enum Part { ATTENTION, FFN, COMPENSATION, RULE, HEAD, N_PARTS };
constexpr int MAX_BATCH = 16;

static int64_t widest_up(const Model& m) {
    int64_t widest = m.intermediate;
    for (int64_t i = 0; i < m.cold_e - m.cold_s; i++) widest = std::max(widest, m.compensations[i].up.rows);
    return widest;
}

static int64_t widest_last(const Model& m) {
    int64_t widest = 0;
    for (int64_t i = 0; i < m.cold_e - m.cold_s; i++) widest = std::max(widest, m.compensations[i].last.columns);
    return widest;
}

// What all threads share of a step.
struct Shared {
    Shared(const Model& m, const Cache& c)
        : q(c.batch * m.heads * m.head_dim), k(c.batch * m.kv_heads * m.head_dim), v(k.size()), mixed(c.batch * m.heads * m.head_dim), gate(c.batch * m.intermediate),
          up(c.batch * widest_up(m)), added(c.batch * m.hidden), instead(c.batch * widest_last(m)) {}
    std::vector<float> q, k, v, mixed, gate, up, added, instead;
};

// What is a thread's own.
struct Own {
    Own(const Model& m, const Cache& c)
        : h(c.batch * m.hidden), x(c.batch * m.hidden), f(m.hidden), scores(c.capacity + 1), key(m.head_dim), value(m.head_dim) {}
    std::vector<float> h, x, f, scores, key, value;
};

struct Engine {
    Engine(const Model& model, const Cache& cache, const Counts& counts, int threads)
        : model(model), cache(cache), counts(counts), shared(model, cache), threads(threads) {
        for (int i = 0; i < threads; i++) own.push_back(std::make_unique<Own>(model, cache));
    }
    const Model& model;
    const Cache& cache;
    const Counts& counts;
    Shared shared;
    std::vector<std::unique_ptr<Own>> own;
    int threads;
    double seconds[N_PARTS] = {};
};

struct Input {
    const int64_t* tokens;
    int64_t slot;
    const uint8_t *ended, *counted, *allowed;
    float* logits;
};

// Some of the rows of a batch.
struct Rows {
    int n = 0, of[MAX_BATCH];
    void add(int row) { of[n++] = row; }
};

class Worker {
   public:
    Worker(Engine& engine, const Input& input, Barrier& barrier, int id, int count)
        : e_(engine), m_(engine.model), c_(engine.cache), s_(engine.shared), own_(*engine.own[id]), in_(input), barrier_(barrier),
          id_(id), count_(count), batch_(int(engine.cache.batch)), last_(Clock::now()) {}

    void run() {
        for (int b = 0; b < batch_; b++) {
            unpack_row(m_.embedding, in_.tokens[b], h(b));
            for (int64_t i = 0; i < m_.hidden; i++) h(b)[i] *= m_.embedding_scale;
        }
        for (int64_t i = 0; i < m_.n_layers; i++) {
            attention(m_.layers[i], i);
            feed_forward(m_.layers[i], i);
        }
        head();
        if (id_ == 0)
            for (int b = 0; b < batch_; b++) *e_.counts.never_skipped += in_.counted[b] && !ever_[b];
    }

   private:
    using Clock = std::chrono::steady_clock;

    float* h(int b) { return own_.h.data() + b * m_.hidden; }
    float* x(int b) { return own_.x.data() + b * m_.hidden; }

    // y[row] = W x[row] for this thread's share of W's rows; `y` is shared, its rows `stride` apart.
    void product(const Matrix& w, const Rows& which, const float* x, int64_t x_stride, float* y, int64_t y_stride) {
        const float* from[MAX_BATCH];
        float* to[MAX_BATCH];
        for (int i = 0; i < which.n; i++) {
            from[i] = x + which.of[i] * x_stride;
            to[i] = y + which.of[i] * y_stride;
        }
        const auto [begin, end] = share(w.rows, id_, count_, 4);
        multiply(w, begin, end, which.n, from, to);
    }

    void attention(const Layer& layer, int64_t index) {
        const Rows all = every_row();
        for (int b = 0; b < batch_; b++) rms_norm(h(b), layer.norm_attention, m_.eps, m_.hidden, x(b));
        product(layer.q, all, own_.x.data(), m_.hidden, s_.q.data(), layer.q.rows);
        product(layer.k, all, own_.x.data(), m_.hidden, s_.k.data(), layer.k.rows);
        product(layer.v, all, own_.x.data(), m_.hidden, s_.v.data(), layer.v.rows);
        barrier_.wait();
        const auto [begin, end] = share(batch_ * m_.heads, id_, count_, 1);
        for (int64_t item = begin; item < end; item++) {
            if (c_.format == FLOAT32) head_of_attention<float>(layer, index, int(item / m_.heads), item % m_.heads, item == begin);
            else head_of_attention<uint16_t>(layer, index, int(item / m_.heads), item % m_.heads, item == begin);
        }
        barrier_.wait();
        product(layer.out, all, s_.mixed.data(), m_.heads * m_.head_dim, s_.added.data(), m_.hidden);
        barrier_.wait();
        for (int b = 0; b < batch_; b++) add(b, layer.after_attention);
        lap(ATTENTION);
    }

    // Its key and value are turned and kept for the heads that share them; the first of these writes them into the cache.
    template <typename Number>
    void head_of_attention(const Layer& layer, int64_t index, int b, int64_t head, bool first_of_mine) {
        const int64_t size = m_.head_dim, group = m_.heads / m_.kv_heads, kv = head / group;
        const int64_t position = in_.slot - c_.starts[b];
        const float *cos = layer.cos + position * m_.rotary, *sin = layer.sin + position * m_.rotary;
        const int64_t place = (((index * batch_ + b) * m_.kv_heads) + kv) * c_.capacity * size;
        Number *keys = static_cast<Number*>(c_.keys) + place, *values = static_cast<Number*>(c_.values) + place;
        if (first_of_mine || head % group == 0) {
            std::copy_n(&s_.k[(b * m_.kv_heads + kv) * size], size, own_.key.data());
            std::copy_n(&s_.v[(b * m_.kv_heads + kv) * size], size, own_.value.data());
            if (layer.k_norm) rms_norm(own_.key.data(), layer.k_norm, m_.eps, size, own_.key.data());
            rotate(own_.key.data(), cos, sin, m_.rotary);
        }
        if (head % group == 0)
            for (int64_t i = 0; i < size; i++) {
                put(keys + in_.slot * size + i, own_.key[i]);
                put(values + in_.slot * size + i, own_.value[i]);
            }
        float* q = &s_.q[(b * m_.heads + head) * size];
        if (layer.q_norm) rms_norm(q, layer.q_norm, m_.eps, size, q);
        rotate(q, cos, sin, m_.rotary);
        int64_t from = c_.starts[b];
        if (layer.window > 0) from = std::max(from, in_.slot - layer.window + 1);
        attend(q, keys + from * size, values + from * size, own_.key.data(), own_.value.data(), in_.slot - from, size,
               {m_.attention_scale, m_.attention_cap}, own_.scores.data(), s_.mixed.data() + (b * m_.heads + head) * size);
    }

    void feed_forward(const Layer& layer, int64_t index) {
        for (int b = 0; b < batch_; b++) rms_norm(h(b), layer.norm_ffn, m_.eps, m_.hidden, x(b));
        const bool in_region = m_.rule != NEVER && m_.cold_s <= index && index < m_.cold_e;
        const Compensation* instead = in_region ? m_.compensations + index - m_.cold_s : nullptr;
        Rows running, skipping;
        for (int b = 0; b < batch_; b++)  // a row that has ended needs no FFN, and must not have one read for it
            if (!in_.ended[b]) (instead && skips(*instead, index, b) ? skipping : running).add(b);
        lap(RULE);
        if (running.n) {
            const int64_t n = m_.intermediate;
            product(layer.gate, running, own_.x.data(), m_.hidden, s_.gate.data(), n);
            product(layer.up, running, own_.x.data(), m_.hidden, s_.up.data(), n);
            const auto [begin, end] = share(n, id_, count_, 4);
            for (int i = 0; i < running.n; i++)
                activate(m_.activation, &s_.gate[running.of[i] * n + begin], &s_.up[running.of[i] * n + begin], end - begin);
            lap(FFN);
        }
        if (skipping.n && instead->last.data) {
            start_compensation(*instead, skipping);
            lap(COMPENSATION);
        }
        barrier_.wait();
        if (running.n) {
            product(layer.down, running, s_.gate.data(), m_.intermediate, s_.added.data(), m_.hidden);
            lap(FFN);
        }
        if (skipping.n) {
            finish_compensation(*instead, skipping);
            lap(COMPENSATION);
        }
        barrier_.wait();
        for (int i = 0; i < skipping.n; i++) add(skipping.of[i], nullptr);
        for (int i = 0; i < running.n; i++) {
            if (m_.rule == COSINE && in_region && index + 1 < m_.cold_e) observe(layer, index, running.of[i]);
            add(running.of[i], layer.after_ffn);
        }
        lap(running.n ? FFN : COMPENSATION);
    }

    bool skips(const Compensation& instead, int64_t index, int b) {
        bool skip = remaining_[b] > 0;
        if (m_.rule == PREDICTED_DAMAGE) {
            if (!in_.allowed[b]) return false;
            skip = dot(instead.probe, x(b), m_.hidden) + instead.probe_bias < m_.threshold;
            if (id_ == 0) e_.counts.checked[index]++;
        }
        if (!skip) return false;
        if (id_ == 0) {
            e_.counts.skipped[index]++;
            e_.counts.first_skipped[index] += !ever_[b];
        }
        ever_[b] = true;
        remaining_[b]--;
        return true;
    }

    // Arms the rule `cosine`: the token skips what follows if this FFN hardly turns its stream.
    void observe(const Layer& layer, int64_t index, int b) {
        remaining_[b] = 0;
        if (!in_.allowed[b]) return;
        if (id_ == 0) e_.counts.checked[index]++;
        const float *before = h(b), *f = behind(b, layer.after_ffn);
        for (int64_t i = 0; i < m_.hidden; i++) own_.f[i] = before[i] + f[i];
        const float* after = own_.f.data();
        const float lengths = std::sqrt(dot(before, before, m_.hidden)) * std::sqrt(dot(after, after, m_.hidden));
        if (dot(before, after, m_.hidden) / lengths >= m_.threshold) remaining_[b] = int32_t(m_.reach);
    }

    // What `last` multiplies: the first factor's product or x, and then the neurons' activations.
    void start_compensation(const Compensation& instead, const Rows& which) {
        const int64_t n = instead.gate.rows, width = instead.last.columns, n_before = width - n;
        float* z = s_.instead.data();
        if (instead.first.data) {
            product(instead.first, which, own_.x.data(), m_.hidden, z, width);
        } else if (n_before) {
            const auto [begin, end] = share(n_before, id_, count_, WIDTH);
            for (int i = 0; i < which.n; i++) std::copy(x(which.of[i]) + begin, x(which.of[i]) + end, z + which.of[i] * width + begin);
        }
        if (!n) return;
        product(instead.gate, which, own_.x.data(), m_.hidden, z + n_before, width);
        product(instead.up, which, own_.x.data(), m_.hidden, s_.up.data(), m_.intermediate);
        const auto [begin, end] = share(n, id_, count_, 4);
        for (int i = 0; i < which.n; i++)
            activate(m_.activation, z + which.of[i] * width + n_before + begin, &s_.up[which.of[i] * m_.intermediate + begin], end - begin);
    }

    void finish_compensation(const Compensation& instead, const Rows& which) {
        if (instead.last.data) return product(instead.last, which, s_.instead.data(), instead.last.columns, s_.added.data(), m_.hidden);
        const auto [begin, end] = share(m_.hidden, id_, count_, WIDTH);
        for (int i = 0; i < which.n; i++) std::copy(instead.bias + begin, instead.bias + end, &s_.added[which.of[i] * m_.hidden + begin]);
    }

    // What the block adds for row b: its output, behind a norm if there is one.
    const float* behind(int b, const float* norm) {
        const float* added = &s_.added[b * m_.hidden];
        if (!norm) return added;
        rms_norm(added, norm, m_.eps, m_.hidden, x(b));
        return x(b);
    }

    void add(int b, const float* norm) {
        const float* added = behind(b, norm);
        float* to = h(b);
        for (int64_t i = 0; i < m_.hidden; i++) to[i] += added[i];
    }

    void head() {
        for (int b = 0; b < batch_; b++) rms_norm(h(b), m_.norm, m_.eps, m_.hidden, x(b));
        product(m_.head, every_row(), own_.x.data(), m_.hidden, in_.logits, m_.head.rows);
        const auto [begin, end] = share(m_.head.rows, id_, count_, 4);
        if (m_.logit_cap > 0)
            for (int b = 0; b < batch_; b++)
                for (int64_t i = begin; i < end; i++) {
                    float& logit = in_.logits[b * m_.head.rows + i];
                    logit = m_.logit_cap * std::tanh(logit / m_.logit_cap);
                }
        lap(HEAD);
    }

    Rows every_row() const {
        Rows all;
        for (int b = 0; b < batch_; b++) all.add(b);
        return all;
    }

    void lap(Part part) {
        if (id_ != 0) return;
        const auto now = Clock::now();
        e_.seconds[part] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

    Engine& e_;
    const Model& m_;
    const Cache& c_;
    Shared& s_;
    Own& own_;
    const Input& in_;
    Barrier& barrier_;
    const int id_, count_, batch_;
    Clock::time_point last_;
    int32_t remaining_[MAX_BATCH] = {};
    bool ever_[MAX_BATCH] = {};
};

extern "C" {

Engine* ffnskip_open(const Model* model, const Cache* cache, const Counts* counts, int threads) {
    return new Engine(*model, *cache, *counts, threads);
}

void ffnskip_close(Engine* engine) { delete engine; }

const double* ffnskip_seconds(const Engine* engine) { return engine->seconds; }

void ffnskip_step(Engine* engine, const Input* input) {
#ifdef _OPENMP
    // The barrier is made inside, when it is known how many threads there are: fewer than were asked for may come.
    std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(engine->threads)
    {
#pragma omp single
        barrier = std::make_unique<Barrier>(omp_get_num_threads());
        Worker(*engine, *input, *barrier, omp_get_thread_num(), omp_get_num_threads()).run();
    }
#else
    Barrier barrier(1);
    Worker(*engine, *input, barrier, 0, 1).run();
#endif
}
}
