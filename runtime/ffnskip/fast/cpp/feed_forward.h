// The feed-forward block of a layer, the decision to skip it, and what is added where it is skipped.
#pragma once

#include "worker.h"

inline void Worker::feed_forward(const Layer& layer, int64_t index) {
    for (int b = 0; b < batch_; b++) rms_norm(h(b), layer.norm_ffn, m_.eps, m_.hidden, x(b));
    const bool in_region = m_.rule != NEVER && m_.cold_s <= index && index < m_.cold_e;
    const Compensation* compensation = in_region ? m_.compensations + index - m_.cold_s : nullptr;
    Rows running, skipping;
    for (int b = 0; b < batch_; b++)  // a row that has ended needs no FFN, and must not have one read for it
        if (!in_.ended[b]) (compensation && skips(*compensation, index, b) ? skipping : running).add(b);
    lap(RULE);
    if (running.n) {
        const int64_t n = m_.intermediate;
        product(running, mine_.x.data(), m_.hidden, {{&layer.gate, s_.gate.data(), n}, {&layer.up, s_.up.data(), n}});
        const auto [begin, end] = share(n, id_, count_, 4);
        for (int i = 0; i < running.n; i++)
            activate(m_.activation, &s_.gate[running.of[i] * n + begin], &s_.up[running.of[i] * n + begin],
                     end - begin);
        lap(FFN);
    }
    if (skipping.n && compensation->last.data) {
        start_compensation(*compensation, skipping);
        lap(COMPENSATION);
    }
    barrier_.wait();
    if (running.n) {
        product(running, s_.gate.data(), m_.intermediate, {{&layer.down, s_.added.data(), m_.hidden}});
        lap(FFN);
    }
    if (skipping.n) {
        finish_compensation(*compensation, skipping);
        lap(COMPENSATION);
    }
    barrier_.wait();
    for (int i = 0; i < skipping.n; i++) add(skipping.of[i], s_.added, nullptr);
    for (int i = 0; i < running.n; i++) {
        if (m_.rule == COSINE && in_region && index + 1 < m_.cold_e) observe(layer, index, running.of[i]);
        add(running.of[i], s_.added, layer.after_ffn);
    }
    lap(running.n ? FFN : COMPENSATION);
}

inline bool Worker::skips(const Compensation& compensation, int64_t index, int b) {
    bool skip = remaining_[b] > 0;
    if (m_.rule == PREDICTED_DAMAGE) {
        if (!in_.allowed[b]) return false;
        skip = dot(compensation.probe, x(b), m_.hidden) + compensation.probe_bias < m_.threshold;
        if (id_ == 0) step_.counts.checked[index]++;
    }
    if (!skip) return false;
    if (id_ == 0) {
        step_.counts.skipped[index]++;
        step_.counts.first_skipped[index] += !ever_[b];
    }
    ever_[b] = true;
    remaining_[b]--;
    return true;
}

// Arms the rule `cosine`: the token skips what follows if this FFN hardly turns its stream.
inline void Worker::observe(const Layer& layer, int64_t index, int b) {
    remaining_[b] = 0;
    if (!in_.allowed[b]) return;
    if (id_ == 0) step_.counts.checked[index]++;
    const float *before = h(b), *f = behind(b, s_.added, layer.after_ffn);
    for (int64_t i = 0; i < m_.hidden; i++) mine_.f[i] = before[i] + m_.residual_scale * f[i];
    const float* after = mine_.f.data();
    const float lengths = std::sqrt(dot(before, before, m_.hidden)) * std::sqrt(dot(after, after, m_.hidden));
    if (dot(before, after, m_.hidden) / lengths >= m_.threshold) remaining_[b] = int32_t(m_.reach);
}

// What `last` multiplies: the first factor's product or x, and then the neurons' activations.
inline void Worker::start_compensation(const Compensation& compensation, const Rows& which) {
    const int64_t n = compensation.gate.rows, width = compensation.last.columns, n_before = width - n;
    float* z = s_.z.data();
    if (compensation.first.data) {
        product(which, mine_.x.data(), m_.hidden, {{&compensation.first, z, width}});
    } else if (n_before) {
        const auto [begin, end] = share(n_before, id_, count_, WIDTH);
        for (int i = 0; i < which.n; i++)
            std::copy(x(which.of[i]) + begin, x(which.of[i]) + end, z + which.of[i] * width + begin);
    }
    if (!n) return;
    product(which, mine_.x.data(), m_.hidden,
            {{&compensation.gate, z + n_before, width}, {&compensation.up, s_.up.data(), m_.intermediate}});
    const auto [begin, end] = share(n, id_, count_, 4);
    for (int i = 0; i < which.n; i++)
        activate(m_.activation, z + which.of[i] * width + n_before + begin,
                 &s_.up[which.of[i] * m_.intermediate + begin], end - begin);
}

inline void Worker::finish_compensation(const Compensation& compensation, const Rows& which) {
    if (compensation.last.data)
        return product(which, s_.z.data(), compensation.last.columns,
                       {{&compensation.last, s_.added.data(), m_.hidden}});
    const auto [begin, end] = share(m_.hidden, id_, count_, WIDTH);
    for (int i = 0; i < which.n; i++)
        std::copy(compensation.bias + begin, compensation.bias + end, &s_.added[which.of[i] * m_.hidden + begin]);
}
