#include "pool.hpp"

#include <pthread.h>

#include <utility>

namespace moe_surgery::cpu {
namespace {

// Spins before a thread yields, and before it sleeps: about 50 us and 1 ms.
constexpr int kSpinsBeforeYield = 1000;
constexpr int kSpinsBeforeSleep = 20000;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Never destroyed: its threads may run until the process ends.
Pool* shared_pool = nullptr;
std::mutex* shared_guard = new std::mutex;

// A forked child has no threads, and its copies of the locks may stay locked.
void reset_in_child() {
    shared_pool = nullptr;
    shared_guard = new std::mutex;
}

}  // namespace

// Outlives the call that created it, so that late threads find no work left. The phases refer to the caller's
// data, which is used only while working on a piece.
class Job {
  public:
    Job(int threads, std::vector<Phase> phases) : threads_(threads), phases_(std::move(phases)) {
        for (const Phase& phase : phases_) {
            progress_.emplace_back(new Progress(static_cast<std::size_t>(threads)));
            for (int i = 0; i < threads; ++i) {
                Share& share = progress_.back()->shares[static_cast<std::size_t>(i)];
                share.next = phase.count * i / threads;
                share.end = phase.count * (i + 1) / threads;
            }
        }
    }

    void participate(int thread) {
        if (thread >= threads_) return;
        for (std::size_t i = 0; i < phases_.size(); ++i) {
            Progress& progress = *progress_[i];
            work(phases_[i], progress, thread);
            for (int spins = 0; progress.done.load(std::memory_order_acquire) != phases_[i].count; ++spins) {
                if (spins < kSpinsBeforeYield) {
                    pause();
                } else {
                    std::this_thread::yield();
                }
            }
        }
    }

  private:
    struct alignas(64) Share {
        std::atomic<std::ptrdiff_t> next{0};
        std::ptrdiff_t end = 0;
    };
    struct Progress {
        explicit Progress(std::size_t threads) : shares(threads) {}
        std::vector<Share> shares;
        std::atomic<std::ptrdiff_t> done{0};
    };

    // Each thread takes its own range of pieces in order, so that it reads linearly, then steals from the
    // others.
    void work(const Phase& phase, Progress& progress, int thread) {
        for (int i = 0; i < threads_; ++i) {
            Share& share = progress.shares[static_cast<std::size_t>((thread + i) % threads_)];
            while (share.next.load(std::memory_order_relaxed) < share.end) {
                const std::ptrdiff_t piece = share.next.fetch_add(1, std::memory_order_relaxed);
                if (piece >= share.end) break;
                phase.work(piece, thread);
                progress.done.fetch_add(1, std::memory_order_acq_rel);
            }
        }
    }

    const int threads_;
    const std::vector<Phase> phases_;
    std::vector<std::unique_ptr<Progress>> progress_;
};

Pool& Pool::shared() {
    static const int registered = pthread_atfork(nullptr, nullptr, reset_in_child);
    (void)registered;
    const std::lock_guard<std::mutex> guard(*shared_guard);
    if (!shared_pool) shared_pool = new Pool;
    return *shared_pool;
}

void Pool::run(int threads, std::vector<Phase> phases) {
    if (threads == 1) {
        for (const Phase& phase : phases) {
            for (std::ptrdiff_t piece = 0; piece < phase.count; ++piece) phase.work(piece, 0);
        }
        return;
    }
    const std::lock_guard<std::mutex> turn(turn_);
    while (workers() < threads - 1) {
        workers_.emplace_back(&Pool::serve, this, workers() + 1, number_.load(std::memory_order_relaxed));
    }
    const auto job = std::make_shared<Job>(threads, std::move(phases));
    {
        const std::lock_guard<std::mutex> guard(guard_);
        job_ = job;
        number_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load(std::memory_order_acquire)) wake_.notify_all();
    job->participate(0);
}

void Pool::serve(int thread, std::uint64_t last) {
    for (;;) next(last)->participate(thread);
}

std::shared_ptr<Job> Pool::next(std::uint64_t& last) {
    for (int spins = 0; spins < kSpinsBeforeSleep && number_.load(std::memory_order_acquire) == last; ++spins) pause();
    std::unique_lock<std::mutex> lock(guard_);
    if (number_.load(std::memory_order_relaxed) == last) {
        asleep_.fetch_add(1, std::memory_order_relaxed);
        wake_.wait(lock, [&] { return number_.load(std::memory_order_relaxed) != last; });
        asleep_.fetch_sub(1, std::memory_order_relaxed);
    }
    last = number_.load(std::memory_order_relaxed);
    return job_;
}

}  // namespace moe_surgery::cpu
