// The functions that Python calls: a step takes every row of a batch one token further, or reads prompts.
#include <memory>
#include <new>

#include "attention.h"
#include "feed_forward.h"
#include "parts.h"
#include "products.h"
#include "prompt.h"

extern "C" {

Step* ffnskip_open(const Model* model, const Cache* cache, const Counts* counts, int threads) {
    return new Step(*model, *cache, *counts, threads);
}

int64_t ffnskip_sizeof(const char* name) { return size_of(name); }

void ffnskip_close(Step* step) { delete step; }

const double* ffnskip_seconds(const Step* step) { return step->seconds; }

void ffnskip_step(Step* step, const Input* input) {
    in_parallel(step->threads,
                [&](int id, int count, Barrier& barrier) { Worker(*step, *input, barrier, id, count).run(); });
}

// Writes keys and values of the chunk's tokens into the cache; no token skips anything. Whether there was memory for
// it.
int32_t ffnskip_read(Step* step, const Chunk* chunk) {
    std::unique_ptr<Passage> passage;
    try {
        passage = std::make_unique<Passage>(*step, *chunk);
    } catch (const std::bad_alloc&) {
        return false;
    }
    in_parallel(step->threads, [&](int id, int count, Barrier& barrier) {
        Reader(*step, *chunk, *passage, barrier, id, count).run();
    });
    return true;
}

// y[t] = W x[t] + bias for n vectors one behind the other, which as their products are in float32 or bfloat16.
void ffnskip_multiply(const Matrix* w, int64_t n, const void* x, void* y, int32_t format, int threads) {
    if (format == BFLOAT16) multiply_any(*w, n, static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y), threads);
    else multiply_any(*w, n, static_cast<const float*>(x), static_cast<float*>(y), threads);
}
}
