#include "pool.hpp"

#include <pthread.h>

namespace moe_surgery::cpu {
namespace {

// How often a thread looks before it lets others run, and before it sleeps: some 50 us and 200 us.
constexpr int kLooksBeforeYield = 1000;
constexpr int kLooksBeforeSleep = 4000;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class Done>
void look_until(Done done) {
    for (int looks = 0; !done(); ++looks) {
        if (looks < kLooksBeforeYield) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

// Never destroyed: its threads may run until the process ends.
Pool* shared_pool = nullptr;
std::mutex* shared_guard = new std::mutex;

// The threads do not exist in a forked child, and locks may be held for ever.
void start_afresh() {
    shared_pool = nullptr;
    shared_guard = new std::mutex;
}

}  // namespace

void Barrier::wait() {
    const int round = round_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        waiting_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    look_until([&] { return round_.load(std::memory_order_acquire) != round; });
}

Shares::Shares(std::ptrdiff_t count, int threads) : threads_(threads), shares_(static_cast<std::size_t>(threads)) {
    for (int i = 0; i < threads; ++i) {
        shares_[static_cast<std::size_t>(i)].next = count * i / threads;
        shares_[static_cast<std::size_t>(i)].end = count * (i + 1) / threads;
    }
}

Pool& Pool::shared() {
    static const int registered = pthread_atfork(nullptr, nullptr, start_afresh);
    (void)registered;
    const std::lock_guard<std::mutex> guard(*shared_guard);
    if (!shared_pool) shared_pool = new Pool;
    return *shared_pool;
}

void Pool::start(int threads, Call call, const void* job) {
    const std::lock_guard<std::mutex> turn(turn_);
    while (workers() < threads - 1) {
        workers_.emplace_back(&Pool::serve, this, workers() + 1, job_number_.load(std::memory_order_relaxed));
    }
    if (threads > 1) {
        call_ = call;
        job_ = job;
        threads_ = threads;
        unfinished_.store(workers(), std::memory_order_relaxed);
        job_number_.fetch_add(1, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst)) {
            { const std::lock_guard<std::mutex> guard(sleep_); }
            wake_.notify_all();
        }
    }
    call(job, 0);
    if (threads > 1) look_until([&] { return unfinished_.load(std::memory_order_acquire) == 0; });
}

void Pool::serve(int thread, std::uint64_t seen) {
    for (;;) {
        seen = await(seen);
        if (thread < threads_) call_(job_, thread);
        unfinished_.fetch_sub(1, std::memory_order_release);
    }
}

std::uint64_t Pool::await(std::uint64_t seen) {
    for (int looks = 0; looks < kLooksBeforeSleep; ++looks) {
        const std::uint64_t number = job_number_.load(std::memory_order_acquire);
        if (number != seen) return number;
        pause();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    asleep_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return job_number_.load(std::memory_order_seq_cst) != seen; });
    asleep_.fetch_sub(1, std::memory_order_relaxed);
    return job_number_.load(std::memory_order_acquire);
}

}  // namespace moe_surgery::cpu
