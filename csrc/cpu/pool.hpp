// Threads that stay: they wait for work by spinning a little, then asleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace moe_surgery::cpu {

// Every thread of a job passes `wait` as often as the others do.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait();

  private:
    const int threads_;
    std::atomic<int> waiting_{0};
    std::atomic<int> round_{0};
};

// Pieces 0..count-1 shared out to threads: each takes its own run of them in order, then what others
// have left, so that a thread reads one linear stream unless another is late.
class Shares {
  public:
    Shares(std::ptrdiff_t count, int threads);

    template <class Each>
    void work(int thread, Each each) {
        for (int i = 0; i < threads_; ++i) {
            Share& share = shares_[static_cast<std::size_t>((thread + i) % threads_)];
            for (std::ptrdiff_t k; (k = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) each(k);
        }
    }

  private:
    struct alignas(64) Share {
        std::atomic<std::ptrdiff_t> next{0};
        std::ptrdiff_t end = 0;
    };
    int threads_;
    std::vector<Share> shares_;
};

class Pool {
  public:
    // The process's pool. After a fork the child gets one of its own.
    static Pool& shared();

    // Call job(thread) for thread = 0 .. threads - 1 at the same time, 0 being the caller's, and return when
    // all are done. Calls from several threads take turns. `job` must not throw, nor call `run`.
    template <class Job>
    void run(int threads, const Job& job) {
        start(threads, [](const void* held, int thread) { (*static_cast<const Job*>(held))(thread); }, &job);
    }

    // Threads that exist, the caller's not counted.
    int workers() const { return static_cast<int>(workers_.size()); }

  private:
    using Call = void (*)(const void*, int);
    void start(int threads, Call call, const void* job);
    void serve(int thread, std::uint64_t seen);
    std::uint64_t await(std::uint64_t seen);

    std::mutex turn_;  // held while a job runs
    std::mutex sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<std::uint64_t> job_number_{0};
    std::atomic<int> unfinished_{0};
    std::atomic<int> asleep_{0};
    Call call_ = nullptr;
    const void* job_ = nullptr;
    int threads_ = 0;  // of the present job
};

}  // namespace moe_surgery::cpu
