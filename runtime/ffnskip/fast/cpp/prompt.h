// One thread's way through a chunk of prompts: all its tokens go through a layer together, and then through the next.
//
// What belongs to a token (norms, its tile of a product) is shared out by tokens, attention by some tokens and the
// heads that share keys, and products by rows of the matrices.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <tuple>
#include <vector>

#include "attend_many.h"
#include "state.h"
#include "team.h"

// What the threads share: of each token the residual stream, and what its products are.
struct Passage {
    Passage(const Step& step, const Chunk& chunk) : Passage(step.model, std::min(MANY, chunk.n)) {
        for (int i = 0; i < step.threads; i++)
            attention.push_back(std::make_unique<AttentionRoom>(QUERIES, chunk.last + 1, step.model.head_dim));
    }
    Passage(const Model& m, int64_t n)
        : h(n * m.hidden), q(n * m.heads * m.head_dim), k(n * m.kv_heads * m.head_dim), v(k.size()), mixed(q.size()),
          gate(n * m.intermediate), up(gate.size()), added(h.size()),
          tiles(std::max({m.hidden, m.heads * m.head_dim, m.intermediate}), n) {}
    std::vector<float> h, q, k, v, mixed, gate, up, added;
    TileRoom tiles;
    std::vector<std::unique_ptr<AttentionRoom>> attention;  // of each thread
};

class Reader {
   public:
    Reader(Step& step, const Chunk& chunk, Passage& passage, Barrier& barrier, int id, int count)
        : m_(step.model), c_(step.cache), mine_(*step.scratch[id]), chunk_(chunk), p_(passage), barrier_(barrier),
          id_(id), count_(count), x_(TILE * m_.hidden) {}

    void run() {
        const int64_t parts = (chunk_.n + MANY - 1) / MANY, most = (chunk_.n + parts - 1) / parts;
        for (first_ = 0; first_ < chunk_.n; first_ += n_) {
            n_ = std::min(most, chunk_.n - first_);
            std::tie(begin_, end_) = share(n_, id_, count_, TILE);
            for (int64_t t = begin_; t < end_; t++) {
                unpack_row(m_.embedding, chunk_.tokens[first_ + t], h(t));
                for (int64_t i = 0; i < m_.hidden; i++) h(t)[i] *= m_.embedding_scale;
            }
            for (int64_t i = 0; i < m_.n_layers; i++) {
                attention(m_.layers[i], i);
                feed_forward(m_.layers[i]);
            }
            head();
        }
    }

   private:
    struct Projection {
        const Matrix* w;
        float* y;  // [tokens, rows]
    };

    float* h(int64_t t) { return &p_.h[t * m_.hidden]; }

    auto normed(const float* norm) {
        return [this, norm](int64_t t, float* room) -> const float* {
            rms_norm(h(t), norm, m_.eps, m_.hidden, room);
            return room;
        };
    }

    // The products of matrices that read the same inputs: `input(t, room)` is token t's, where it lies or in a room of
    // the hidden size. Of each product this thread's rows are made when it returns.
    template <typename Input>
    void project(int64_t columns, std::initializer_list<Projection> projections, const Input& input) {
        const auto in_integers = [](const Projection& p) { return p.w->format >= INT8; };
        const bool integers = std::any_of(projections.begin(), projections.end(), in_integers);
        if (integers && !std::all_of(projections.begin(), projections.end(), in_integers)) {
            for (const Projection& one : projections) {
                project(columns, {one}, input);
                barrier_.wait();  // the next one's tiles take the place of these
            }
            return;
        }
        FloatTiles as_floats(p_.tiles, columns);
        IntegerTiles as_integers(p_.tiles, columns);
        for (int64_t t = begin_; t < end_; t += TILE) {
            const float* tile[TILE];
            for (int i = 0; i < TILE; i++) tile[i] = input(std::min(t + i, n_ - 1), &x_[i * m_.hidden]);
            if (integers) as_integers.put(t, tile);
            else as_floats.put(t, tile);
        }
        barrier_.wait();
        for (const auto& [w, y] : projections) {
            const auto [begin, end] = share(w->rows, id_, count_, PANEL);
            switch (w->format) {
                case FLOAT32: multiply_panels<FloatPanel<float>>(*w, begin, end, n_, as_floats, y); break;
                case BFLOAT16: multiply_panels<FloatPanel<uint16_t>>(*w, begin, end, n_, as_floats, y); break;
                case INT8: multiply_panels<IntegerPanel<INT8>>(*w, begin, end, n_, as_integers, y); break;
                case INT4: multiply_panels<IntegerPanel<INT4>>(*w, begin, end, n_, as_integers, y); break;
            }
        }
    }

    void attention(const Layer& layer, int64_t index) {
        project(m_.hidden, {{&layer.q, p_.q.data()}, {&layer.k, p_.k.data()}, {&layer.v, p_.v.data()}},
                normed(layer.norm_attention));
        barrier_.wait();
        if (c_.format == FLOAT32) attend_all<float>(layer, index);
        else attend_all<uint16_t>(layer, index);
        barrier_.wait();
        const int64_t width = m_.heads * m_.head_dim;
        project(width, {{&layer.out, p_.added.data()}}, [&](int64_t t, float*) { return &p_.mixed[t * width]; });
        add(layer.after_attention);
    }

    void feed_forward(const Layer& layer) {
        const int64_t n = m_.intermediate;
        project(m_.hidden, {{&layer.gate, p_.gate.data()}, {&layer.up, p_.up.data()}}, normed(layer.norm_ffn));
        const auto [begin, end] = share(n, id_, count_, PANEL);  // as the products
        for (int64_t t = 0; t < n_; t++)
            activate(m_.activation, &p_.gate[t * n + begin], &p_.up[t * n + begin], end - begin);
        barrier_.wait();
        project(n, {{&layer.down, p_.added.data()}}, [&](int64_t t, float*) { return &p_.gate[t * n]; });
        add(layer.after_ffn);
    }

    // Adds a block's outputs to the stream, behind a norm if there is one.
    void add(const float* norm) {
        barrier_.wait();
        for (int64_t t = begin_; t < end_; t++) {
            float* added = &p_.added[t * m_.hidden];
            rms_norm(added, norm, m_.eps, m_.hidden, added);
            for (int64_t i = 0; i < m_.hidden; i++) h(t)[i] += m_.residual_scale * added[i];
        }
    }

    template <typename Number>
    struct Stretch {  // of the cache: a row's keys and values of one kind
        Number *keys, *values;
    };

    template <typename Number>
    Stretch<Number> cached(int64_t index, int64_t row, int64_t kv) const {
        const int64_t at = ((index * c_.batch + row) * m_.kv_heads + kv) * c_.capacity * m_.head_dim;
        return {static_cast<Number*>(c_.keys) + at, static_cast<Number*>(c_.values) + at};
    }

    // One of some heads that lie side by side, behind its norm and turned to the token's position.
    void place(const Layer& layer, int64_t t, const float* x, int64_t head, int64_t heads, const float* norm,
               float* y) {
        const int64_t position = slot(t) - c_.starts[row(t)];
        norm_head(x + t * heads * m_.head_dim, head, heads, m_.head_dim, norm, m_.norm_across_heads, m_.eps, y);
        rotate(y, layer.cos + position * m_.rotary, layer.sin + position * m_.rotary, m_.rotary);
    }

    template <typename Number>
    void attend_all(const Layer& layer, int64_t index) {
        const int64_t size = m_.head_dim, group = m_.heads / m_.kv_heads;
        for (int64_t t = begin_; t < end_; t++) {
            const int64_t at = slot(t) * size;
            for (int64_t head = 0; head < m_.heads; head++)
                place(layer, t, p_.q.data(), head, m_.heads, layer.q_norm, &p_.mixed[(t * m_.heads + head) * size]);
            for (int64_t kv = 0; kv < m_.kv_heads; kv++) {
                const auto [keys, values] = cached<Number>(index, row(t), kv);
                float* key = mine_.key.data();
                place(layer, t, p_.k.data(), kv, m_.kv_heads, layer.k_norm, key);
                const float* value = &p_.v[(t * m_.kv_heads + kv) * size];
                for (int64_t i = 0; i < size; i++) {
                    put(keys + at + i, key[i]);
                    put(values + at + i, value[i]);
                }
            }
        }
        barrier_.wait();
        const int64_t at_once = std::max<int64_t>(1, QUERIES / group);
        for (int64_t begin = 0, end, turn = 0; begin < n_; begin = end) {
            for (end = begin + 1; end < std::min(n_, begin + at_once) && row(end) == row(begin);) end++;
            for (int64_t kv = 0; kv < m_.kv_heads; kv++, turn++)
                if (turn % count_ == id_) attend_some<Number>(layer, index, begin, end, kv);
        }
    }

    // The heads that share keys of one kind, of tokens [begin, end) of one row. Their results take their queries'
    // place.
    template <typename Number>
    void attend_some(const Layer& layer, int64_t index, int64_t begin, int64_t end, int64_t kv) {
        const int64_t size = m_.head_dim, group = m_.heads / m_.kv_heads;
        const auto seen_from = [&](int64_t t) {
            const int64_t start = c_.starts[row(t)];
            return layer.window > 0 ? std::max(start, slot(t) - layer.window + 1) : start;
        };
        const int64_t from = seen_from(begin), n = slot(end - 1) + 1 - from;
        const auto [keys, values] = cached<Number>(index, row(begin), kv);
        for (int64_t first = 0; first < group; first += QUERIES) {
            queries_.clear();
            for (int64_t t = begin; t < end; t++)
                for (int64_t i = first; i < std::min(group, first + QUERIES); i++) {
                    float* q = &p_.mixed[(t * m_.heads + kv * group + i) * size];
                    queries_.push_back({q, seen_from(t) - from, slot(t) + 1 - from, q});
                }
            attend_many(queries_, keys + from * size, values + from * size, n, size,
                        {m_.attention_scale, m_.attention_cap}, *p_.attention[id_]);
        }
    }

    int64_t row(int64_t t) const { return chunk_.rows[first_ + t]; }
    int64_t slot(int64_t t) const { return chunk_.slots[first_ + t]; }

    // Logits behind the last tokens of rows, where these are among them.
    void head() {
        barrier_.wait();
        const float* from[MAX_BATCH];
        float* to[MAX_BATCH];
        int n = 0;
        for (int64_t t = 0; t < n_; t++) {
            if (slot(t) != chunk_.last) continue;
            float* x = &mine_.x[n * m_.hidden];
            rms_norm(h(t), m_.norm, m_.eps, m_.hidden, x);
            from[n] = x;
            to[n++] = chunk_.logits + row(t) * m_.head.rows;
        }
        const auto [begin, end] = share(m_.head.rows, id_, count_, 4);
        if (n) multiply(m_.head, begin, end, n, from, rounded(m_.head.format, m_.hidden, n, from), to);
        for (int i = 0; i < n; i++) finish_logits(m_, begin, end, to[i]);
        barrier_.wait();
    }

    const Model& m_;
    const Cache& c_;
    Scratch& mine_;
    const Chunk& chunk_;
    Passage& p_;
    Barrier& barrier_;
    const int id_, count_;
    int64_t first_ = 0, n_ = 0;    // the tokens that go together now
    int64_t begin_ = 0, end_ = 0;  // those of them that are this thread's
    std::vector<float> x_;
    std::vector<Query> queries_;
};
