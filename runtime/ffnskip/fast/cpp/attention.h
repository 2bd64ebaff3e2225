// The attention block of a layer.
#pragma once

#include <numeric>

#include "worker.h"

inline void Worker::attention(const Layer& layer, int64_t index) {
    const Rows all = every_row();
    for (int b = 0; b < batch_; b++) rms_norm(h(b), layer.norm_attention, m_.eps, m_.hidden, x(b));
    const std::initializer_list<Projection> qkv = {{&layer.q, s_.q.data(), layer.q.rows},
                                                   {&layer.k, s_.k.data(), layer.k.rows},
                                                   {&layer.v, s_.v.data(), layer.v.rows}};
    if (layer.q.stretch) project_qkv(index, qkv);
    else product(all, mine_.x.data(), m_.hidden, qkv);
    barrier_.wait();
    const float* mixed = mix_values(layer, index);
    if (layer.out.stretch) {
        project_out(layer, index, mixed);
    } else {
        product(all, mixed, m_.heads * m_.head_dim, {{&layer.out, s_.added.data(), m_.hidden}});
        barrier_.wait();
        for (int b = 0; b < batch_; b++) add(b, s_.added, layer.after_attention);
    }
    lap(ATTENTION);
}

// What attention gives, [batch, heads, head_dim]. Threads share out the groups of heads that share keys, so that no two
// threads read the same keys; where there are few, and some threads would get more than others, the positions as well.
inline const float* Worker::mix_values(const Layer& layer, int64_t index) {
    const int64_t groups = batch_ * m_.kv_heads;
    const int64_t spans = groups < 4 * count_ ? count_ / std::gcd<int64_t>(count_, groups) : 1;
    const auto [begin, end] = share(groups * spans, id_, count_, 1);
    for (int64_t i = begin; i < end; i++) {
        const Span span{i / spans, i % spans, spans};
        if (c_.format == FLOAT32) attend_to<float>(layer, index, span);
        else attend_to<uint16_t>(layer, index, span);
    }
    barrier_.wait();
    if (spans == 1) return s_.mixed.data();
    const int64_t heads = batch_ * m_.heads;
    for (int64_t i = 0; i < heads; i++)
        combine(spans, heads, &s_.mixed[i * m_.head_dim], &s_.softmax[i], m_.head_dim, &mine_.mixed[i * m_.head_dim]);
    return mine_.mixed.data();
}

// The heads that share one row's keys of one kind, over a span of its positions. Key and value of the latest are turned
// and written into the cache first, by whoever has the last span.
template <typename Number>
inline void Worker::attend_to(const Layer& layer, int64_t index, Span span) {
    const int64_t size = m_.head_dim, group = m_.heads / m_.kv_heads;
    const int64_t b = span.group / m_.kv_heads, kv = span.group % m_.kv_heads;
    const int64_t position = in_.slot - c_.starts[b];
    const float *cos = layer.cos + position * m_.rotary, *sin = layer.sin + position * m_.rotary;
    const int64_t offset = (index * batch_ * m_.kv_heads + span.group) * c_.capacity * size;
    Number *keys = static_cast<Number*>(c_.keys) + offset, *values = static_cast<Number*>(c_.values) + offset;
    if (span.i == span.of - 1) {
        float* key = mine_.key.data();
        norm_head(&s_.k[b * m_.kv_heads * size], kv, m_.kv_heads, size, layer.k_norm, m_.norm_across_heads, m_.eps,
                  key);
        rotate(key, cos, sin, m_.rotary);
        const float* value = &s_.v[span.group * size];
        for (int64_t i = 0; i < size; i++) {
            put(keys + in_.slot * size + i, key[i]);
            put(values + in_.slot * size + i, value[i]);
        }
    }
    float* q = mine_.query.data();  // apart from what other threads read for norms across heads
    for (int64_t i = 0; i < group; i++) {
        norm_head(&s_.q[b * m_.heads * size], kv * group + i, m_.heads, size, layer.q_norm, m_.norm_across_heads,
                  m_.eps, q + i * size);
        rotate(q + i * size, cos, sin, m_.rotary);
    }
    int64_t from = c_.starts[b];
    if (layer.window > 0) from = std::max(from, in_.slot - layer.window + 1);
    const auto [first, end] = share(in_.slot + 1 - from, int(span.i), int(span.of), 1);
    const int64_t head = span.i * batch_ * m_.heads + span.group * group;
    attend(group, q, keys + (from + first) * size, values + (from + first) * size, end - first, size,
           {m_.attention_scale, m_.attention_cap}, mine_.scores.data(), c_.capacity, &s_.mixed[head * size],
           &s_.softmax[head]);
}
