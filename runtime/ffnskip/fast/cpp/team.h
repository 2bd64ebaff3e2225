// Threads that walk through a step together.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

static inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Waits by spinning: a step has hundreds of barriers, each a few hundred nanoseconds. Gives way when a thread has lost
// its core.
class Barrier {
   public:
    explicit Barrier(int size) : size_(size) {}

    void wait() {
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
            spins < 4096 ? relax() : std::this_thread::yield();
    }

   private:
    const int size_;
    std::atomic<int> arrived_{0}, round_{0};
};

// Calls `work` with the number of each thread, how many there are, and their barrier.
template <typename Work>
static void in_parallel(int threads, const Work& work) {
#ifdef _OPENMP
    // The barrier is made inside, when it is known how many threads there are: fewer than were asked for may come.
    std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        barrier = std::make_unique<Barrier>(omp_get_num_threads());
        work(omp_get_thread_num(), omp_get_num_threads(), *barrier);
    }
#else
    Barrier barrier(1);
    work(0, 1, barrier);
#endif
}

// The share of worker `id` of `count` in `n` things, in whole `unit`s.
static inline std::pair<int64_t, int64_t> share(int64_t n, int id, int count, int64_t unit) {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t begin = units * id / count * unit, end = units * (id + 1) / count * unit;
    return {begin < n ? begin : n, end < n ? end : n};
}
