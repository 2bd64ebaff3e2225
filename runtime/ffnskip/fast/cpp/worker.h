// One thread's way through a step; attention.h, feed_forward.h and parts.h define the blocks of a layer.
//
// All threads walk through all layers together. What is small (norms, decisions) each computes for itself, from the
// same numbers to the same result, into memory of its own; what reads weights is shared out by rows, with a barrier
// behind it.
#pragma once

#include <chrono>
#include <initializer_list>

#include "state.h"
#include "team.h"

// Some of the rows of a batch.
struct Rows {
    int n = 0, of[MAX_BATCH];
    void add(int row) { of[n++] = row; }
};

class Worker {
   public:
    Worker(Step& step, const Input& input, Barrier& barrier, int id, int count)
        : step_(step), m_(step.model), c_(step.cache), s_(step.shared), mine_(*step.scratch[id]), in_(input),
          barrier_(barrier), id_(id), count_(count), batch_(int(step.cache.batch)), last_(Clock::now()) {}

    void run() {
        for (int b = 0; b < batch_; b++) {
            unpack_row(m_.embedding, in_.tokens[b], h(b));
            for (int64_t i = 0; i < m_.hidden; i++) h(b)[i] *= m_.embedding_scale;
        }
        for (int64_t i = 0; i < m_.n_layers; i++) {
            attention(m_.layers[i], i);
            if (m_.layers[i].gate.stretch) feed_forward_of_parts(m_.layers[i], i);
            else feed_forward(m_.layers[i], i);
        }
        head();
        if (id_ != 0) return;
        for (int b = 0; b < batch_; b++) {
            *step_.counts.never_skipped += in_.counted[b] && !ever_[b];
            if (in_.counted[b]) *step_.counts.least = std::min(*step_.counts.least, left_out_[b] / m_.n_layers);
        }
    }

   private:
    using Clock = std::chrono::steady_clock;

    float* h(int b) { return mine_.h.data() + b * m_.hidden; }
    float* x(int b) { return mine_.x.data() + b * m_.hidden; }

    // A matrix and what its products go into: for row b of the batch y + b * stride, memory that all threads share.
    struct Projection {
        const Matrix* w;
        float* y;
        int64_t stride;
    };

    // y[row] = W x[row] of matrices that read the same inputs, for this thread's share of each one's rows.
    void product(const Rows& which, const float* x, int64_t x_stride, std::initializer_list<Projection> projections) {
        const float* from[MAX_BATCH];
        for (int i = 0; i < which.n; i++) from[i] = x + which.of[i] * x_stride;
        Format format = FLOAT32;
        for (const auto& to : projections) format = std::max(format, to.w->format);
        const Rounded* integers = rounded(format, projections.begin()->w->columns, which.n, from);
        for (const auto& [w, y, stride] : projections) {
            float* to[MAX_BATCH];
            for (int i = 0; i < which.n; i++) to[i] = y + which.of[i] * stride;
            const auto [begin, end] = share(w->rows, id_, count_, 4);
            multiply(*w, begin, end, which.n, from, integers, to);
        }
    }

    void attention(const Layer& layer, int64_t index);
    struct Span {  // the i-th of so many, of the positions of those of a row's heads that share their keys
        int64_t group, i, of;
    };
    const float* mix_values(const Layer& layer, int64_t index);
    template <typename Number>
    void attend_to(const Layer& layer, int64_t index, Span span);

    void feed_forward(const Layer& layer, int64_t index);
    bool skips(const Compensation& compensation, int64_t index, int b);
    void observe(const Layer& layer, int64_t index, int b);
    void start_compensation(const Compensation& compensation, const Rows& which);
    void finish_compensation(const Compensation& compensation, const Rows& which);

    Rows running() const;
    void choose(Role role, int64_t index, const Rows& which, const float* x, int64_t width);
    void add_up(const Matrix& w, const Rows& which);
    void collect(const Projection& projection, const Rows& which, int64_t begin, int64_t end, int64_t first);
    void project(const Rows& which, std::initializer_list<Projection> matrices);
    void project_qkv(int64_t index, std::initializer_list<Projection> qkv);
    void project_out(const Layer& layer, int64_t index, const float* mixed);
    void feed_forward_of_parts(const Layer& layer, int64_t index);

    // What a block adds for row b: its output, behind a norm if there is one.
    const float* behind(int b, const std::vector<float>& outputs, const float* norm) {
        const float* output = &outputs[b * m_.hidden];
        if (!norm) return output;
        rms_norm(output, norm, m_.eps, m_.hidden, x(b));
        return x(b);
    }

    void add(int b, const std::vector<float>& outputs, const float* norm) {
        const float* added = behind(b, outputs, norm);
        float* to = h(b);
        for (int64_t i = 0; i < m_.hidden; i++) to[i] += m_.residual_scale * added[i];
    }

    void head() {
        for (int b = 0; b < batch_; b++) rms_norm(h(b), m_.norm, m_.eps, m_.hidden, x(b));
        product(every_row(), mine_.x.data(), m_.hidden, {{&m_.head, in_.logits, m_.head.rows}});
        const auto [begin, end] = share(m_.head.rows, id_, count_, 4);
        for (int b = 0; b < batch_; b++) finish_logits(m_, begin, end, in_.logits + b * m_.head.rows);
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
        step_.seconds[part] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

    Step& step_;
    const Model& m_;
    const Cache& c_;
    Shared& s_;
    Scratch& mine_;
    const Input& in_;
    Barrier& barrier_;
    const int id_, count_, batch_;
    Clock::time_point last_;
    int turn_ = 0;  // which of the buffers of sums
    int32_t remaining_[MAX_BATCH] = {};
    bool ever_[MAX_BATCH] = {};
    double left_out_[MAX_BATCH] = {};  // in whole FFNs
};
