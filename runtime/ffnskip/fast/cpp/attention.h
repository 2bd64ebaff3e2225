// The attention block of a layer.
#pragma once

#include "worker.h"

inline void Worker::attention(const Layer& layer, int64_t index) {
    const Rows all = every_row();
    for (int b = 0; b < batch_; b++) rms_norm(h(b), layer.norm_attention, m_.eps, m_.hidden, x(b));
    if (layer.q.stretch) {
        project_qkv(layer, index);
    } else {
        product(layer.q, all, mine_.x.data(), m_.hidden, s_.q.data(), layer.q.rows);
        product(layer.k, all, mine_.x.data(), m_.hidden, s_.k.data(), layer.k.rows);
        product(layer.v, all, mine_.x.data(), m_.hidden, s_.v.data(), layer.v.rows);
    }
    barrier_.wait();
    const auto [begin, end] = share(batch_ * m_.heads, id_, count_, 1);
    for (int64_t item = begin; item < end; item++) {
        const int b = int(item / m_.heads);
        const int64_t head = item % m_.heads;
        if (c_.format == FLOAT32) head_of_attention<float>(layer, index, b, head, item == begin);
        else head_of_attention<uint16_t>(layer, index, b, head, item == begin);
    }
    barrier_.wait();
    if (layer.out.stretch) {
        project_out(layer, index);
    } else {
        product(layer.out, all, s_.mixed.data(), m_.heads * m_.head_dim, s_.added.data(), m_.hidden);
        barrier_.wait();
        for (int b = 0; b < batch_; b++) add(b, s_.added, layer.after_attention);
    }
    lap(ATTENTION);
}

// Its key and value are turned and kept for the heads that share them; the first of these writes them into the cache.
template <typename Number>
inline void Worker::head_of_attention(const Layer& layer, int64_t index, int b, int64_t head, bool first_of_mine) {
    const int64_t size = m_.head_dim, group = m_.heads / m_.kv_heads, kv = head / group;
    const int64_t position = in_.slot - c_.starts[b];
    const float *cos = layer.cos + position * m_.rotary, *sin = layer.sin + position * m_.rotary;
    const int64_t offset = (((index * batch_ + b) * m_.kv_heads) + kv) * c_.capacity * size;
    Number *keys = static_cast<Number*>(c_.keys) + offset, *values = static_cast<Number*>(c_.values) + offset;
    if (first_of_mine || head % group == 0) {
        norm_head(&s_.k[b * m_.kv_heads * size], kv, m_.kv_heads, size, layer.k_norm, m_.norm_across_heads, m_.eps,
                  mine_.key.data());
        std::copy_n(&s_.v[(b * m_.kv_heads + kv) * size], size, mine_.value.data());
        rotate(mine_.key.data(), cos, sin, m_.rotary);
    }
    if (head % group == 0)
        for (int64_t i = 0; i < size; i++) {
            put(keys + in_.slot * size + i, mine_.key[i]);
            put(values + in_.slot * size + i, mine_.value[i]);
        }
    float* q = mine_.query.data();  // apart from what other threads read for norms across heads
    norm_head(&s_.q[b * m_.heads * size], head, m_.heads, size, layer.q_norm, m_.norm_across_heads, m_.eps, q);
    rotate(q, cos, sin, m_.rotary);
    int64_t from = c_.starts[b];
    if (layer.window > 0) from = std::max(from, in_.slot - layer.window + 1);
    attend(q, keys + from * size, values + from * size, mine_.key.data(), mine_.value.data(), in_.slot - from, size,
           {m_.attention_scale, m_.attention_cap}, mine_.scores.data(), s_.mixed.data() + (b * m_.heads + head) * size);
}
