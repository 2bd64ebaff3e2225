// The functions that Python calls: one step takes every row of a batch one token further.
#include <memory>

#include "attention.h"
#include "feed_forward.h"
#include "parts.h"
#include "products.h"

#ifdef _OPENMP
#include <omp.h>
#endif

extern "C" {

Step* ffnskip_open(const Model* model, const Cache* cache, const Counts* counts, int threads) {
    return new Step(*model, *cache, *counts, threads);
}

int64_t ffnskip_sizeof(const char* name) { return size_of(name); }

void ffnskip_close(Step* step) { delete step; }

const double* ffnskip_seconds(const Step* step) { return step->seconds; }

void ffnskip_step(Step* step, const Input* input) {
#ifdef _OPENMP
    // The barrier is made inside, when it is known how many threads there are: fewer than were asked for may come.
    std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(step->threads)
    {
#pragma omp single
        barrier = std::make_unique<Barrier>(omp_get_num_threads());
        Worker(*step, *input, *barrier, omp_get_thread_num(), omp_get_num_threads()).run();
    }
#else
    Barrier barrier(1);
    Worker(*step, *input, barrier, 0, 1).run();
#endif
}

// y[t] = W x[t] + bias for n vectors of float32, one behind the other.
void ffnskip_multiply(const Matrix* w, int64_t n, const float* x, float* y, int threads) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    multiply_many(*w, n, x, y, omp_get_thread_num(), omp_get_num_threads());
#else
    multiply_many(*w, n, x, y, 0, 1);
#endif
}
}
