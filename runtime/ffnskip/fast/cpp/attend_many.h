// Attention of many queries over the same keys and values: two products with many vectors, and a softmax between them.
#pragma once

#include <algorithm>
#include <vector>

#include "attend.h"
#include "products.h"

constexpr int64_t QUERIES = 48;  // at a time: enough for keys to be worth unpacking

struct Query {
    const float* q;
    int64_t begin, end;  // the positions that it sees
    float* y;
};

// What a thread needs for so many queries at a time, over so many positions.
struct AttentionRoom {
    AttentionRoom(int64_t queries, int64_t positions, int64_t size)
        : tiles(std::max(positions, size), queries), scores(queries * positions), mixed(queries * size) {}
    TileRoom tiles;
    std::vector<float> scores, mixed;
};

// y = softmax(scale * q . keys) . values of each query, over `n` positions of which it sees some.
template <typename Number>
static void attend_many(const std::vector<Query>& queries, const Number* keys, const Number* values, int64_t n,
                        int64_t size, Scoring how, AttentionRoom& room) {
    using Panel = FloatPanel<Number>;
    const int64_t count = queries.size();
    const auto fill = [&](FloatTiles& tiles, const auto& vector) {
        for (int64_t t = 0; t < count; t += TILE) {
            const float* tile[TILE];
            for (int64_t i = 0; i < TILE; i++) tile[i] = vector(std::min(t + i, count - 1));
            tiles.put(t, tile);
        }
    };
    const Format format = sizeof(Number) == 4 ? FLOAT32 : BFLOAT16;
    FloatTiles asked(room.tiles, size);
    fill(asked, [&](int64_t i) { return queries[i].q; });
    multiply_panels<Panel>({keys, nullptr, nullptr, n, size, 0, format}, 0, n, count, asked, room.scores.data());
    for (int64_t i = 0; i < count; i++) {
        const auto [q, begin, end, y] = queries[i];
        float* scores = &room.scores[i * n];
        const Softmax softmax = exponentials(how, end - begin, scores + begin);
        for (int64_t k = begin; k < end; k++) scores[k] /= softmax.sum;
        std::fill(scores, scores + begin, 0.0f);
        std::fill(scores + end, scores + n, 0.0f);
    }
    FloatTiles shares(room.tiles, n);
    fill(shares, [&](int64_t i) { return &room.scores[i * n]; });
    multiply_panels<Panel>({values, nullptr, nullptr, size, n, size, format}, 0, size, count, shares,
                           room.mixed.data());
    for (int64_t i = 0; i < count; i++) std::copy_n(&room.mixed[i * size], size, queries[i].y);
}
