// The blocks of a layer whose matrices lie input by input, so that single inputs can be left out.
//
// Threads share out the inputs that are kept, each adds up sums of its own, and behind a barrier each collects the sums
// of all for its share of the outputs: half a stretch per thread would be too short for the memory to run at full
// speed.
#pragma once

#include "worker.h"

// Lists which inputs of a product are kept, and counts the others; all threads come to the same list.
inline void Worker::choose(Role role, int64_t index, const Rows& which, const float* x, int64_t width) {
    const bool in_region = m_.rule == PRICE && m_.cold_s <= index && index < m_.cold_e;
    const float* limits = in_region ? m_.parts[index - m_.cold_s].limits[role] : nullptr;
    const float *from[MAX_BATCH], *limit[MAX_BATCH];
    int64_t left_out[MAX_BATCH];
    for (int i = 0; i < which.n; i++) {
        from[i] = x + which.of[i] * width;
        limit[i] = limits && in_.allowed[which.of[i]] ? limits : s_.no_limits.data();
    }
    if (which.n == 1) mine_.kept.list(std::integral_constant<int, 1>(), from, limit, width, left_out);
    else mine_.kept.list(which.n, from, limit, width, left_out);
    if (!in_region) return;
    for (int i = 0; i < which.n; i++) {
        const int b = which.of[i];
        ever_[b] |= left_out[i] > 0;
        left_out_[b] += double(left_out[i]) * m_.shares[role];
        if (id_ != 0) continue;
        step_.counts.left_out[index * N_ROLES + role] += left_out[i];
        if (role == FFN_INPUT) step_.counts.checked[index] += in_.allowed[b];
    }
}

// The sums of this thread's share of the inputs, for all outputs of a stretch that begins with those of `w`; then a
// barrier.
inline void Worker::add_up(const Matrix& w, const Rows& which) {
    turn_ ^= 1;
    const auto [begin, end] = share(mine_.kept.n, id_, count_, AT_ONCE);
    sum_inputs(w, mine_.kept, begin, end, which.n, w.stretch, mine_.sums[turn_].data());
    barrier_.wait();
}

// y[row] = W x[row] for rows [begin, end) of W, from the sums of all threads; they begin at output `first` of a stretch.
inline void Worker::collect(const Projection& projection, const Rows& which, int64_t begin, int64_t end,
                            int64_t first) {
    const Matrix& w = *projection.w;
    const float* scale = w.format == INT8 ? static_cast<const float*>(w.scale) : nullptr;
    for (int i = 0; i < which.n; i++) {
        float* to = projection.y + which.of[i] * projection.stride;
        std::fill(to + begin, to + end, 0.0f);
        for (int thread = 0; thread < count_; thread++) {
            const float* sums = step_.scratch[thread]->sums[turn_].data() + i * w.stretch + first;
            for (int64_t r = begin; r < end; r++) to[r] += sums[r];
        }
        if (scale)
            for (int64_t r = begin; r < end; r++) to[r] *= scale[r];
        if (w.bias)
            for (int64_t r = begin; r < end; r++) to[r] += w.bias[r];
    }
}

// y[row] = W x[row] of matrices that read the same inputs: this thread's share of each one's rows, into memory that all
// threads read behind a barrier. Matrices of one format lie in one stretch, and are summed up as one.
inline void Worker::project(const Rows& which, std::initializer_list<Projection> matrices) {
    int64_t first = 0, outputs = 0;  // of the stretch
    for (const Projection& each : matrices) {
        if (first == outputs) {
            add_up(*each.w, which);
            first = 0;
            outputs = each.w->stretch;
        }
        const auto [begin, end] = share(each.w->rows, id_, count_, 4);
        collect(each, which, begin, end, first);
        first += each.w->rows;
    }
}

inline Rows Worker::running() const {
    Rows rows;
    for (int b = 0; b < batch_; b++)
        if (!in_.ended[b]) rows.add(b);
    return rows;
}

inline void Worker::project_qkv(int64_t index, std::initializer_list<Projection> qkv) {
    const Rows rows = running();
    choose(ATTENTION_INPUT, index, rows, mine_.x.data(), m_.hidden);
    project(rows, qkv);
}

inline void Worker::project_out(const Layer& layer, int64_t index, const float* mixed) {
    const Rows rows = running();
    choose(ATTENTION_OUTPUT, index, rows, mixed, m_.heads * m_.head_dim);
    add_up(layer.out, rows);
    collect({&layer.out, mine_.added.data(), m_.hidden}, rows, 0, m_.hidden, 0);
    for (int i = 0; i < rows.n; i++) add(rows.of[i], mine_.added, layer.after_attention);
}

inline void Worker::feed_forward_of_parts(const Layer& layer, int64_t index) {
    const Rows rows = running();
    const int64_t n = m_.intermediate;
    for (int i = 0; i < rows.n; i++) rms_norm(h(rows.of[i]), layer.norm_ffn, m_.eps, m_.hidden, x(rows.of[i]));
    choose(FFN_INPUT, index, rows, mine_.x.data(), m_.hidden);
    lap(RULE);
    project(rows, {{&layer.gate, s_.gate.data(), n}, {&layer.up, s_.up.data(), n}});
    const auto [begin, end] = share(n, id_, count_, 4);  // what this thread has collected
    for (int i = 0; i < rows.n; i++)
        activate(m_.activation, &s_.gate[rows.of[i] * n + begin], &s_.up[rows.of[i] * n + begin], end - begin);
    barrier_.wait();
    lap(FFN);
    choose(NEURONS, index, rows, s_.gate.data(), n);
    lap(RULE);
    add_up(layer.down, rows);
    collect({&layer.down, mine_.added.data(), m_.hidden}, rows, 0, m_.hidden, 0);
    for (int i = 0; i < rows.n; i++) add(rows.of[i], mine_.added, layer.after_ffn);
    lap(FFN);
}
