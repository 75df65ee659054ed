// Threads that stay: they wait for work by spinning a little, then asleep.
//
// Work is cut into pieces, and a phase is over when its pieces are done, not when every thread has come: one
// that the system lets wait holds nobody up unless it has a piece in hand.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace moe_surgery::cpu {

// `work(piece, thread)` for the pieces 0 .. count - 1, by any thread and in any order.
struct Phase {
    std::ptrdiff_t count;
    std::function<void(std::ptrdiff_t, int)> work;
};

class Job;

class Pool {
  public:
    // The process's pool. After a fork the child gets one of its own.
    static Pool& shared();

    // Carry out the phases one after the other on `threads` threads, the caller's among them, numbered from
    // 0. Calls from several threads take turns. No `work` may throw, or call `run`.
    void run(int threads, std::vector<Phase> phases);

    // Threads that exist, the caller's not counted.
    int workers() const { return static_cast<int>(workers_.size()); }

  private:
    void serve(int thread, std::uint64_t seen);
    std::shared_ptr<Job> next(std::uint64_t& seen);

    std::mutex turn_;  // held while a job runs
    std::mutex guard_;  // of job_ and of sleeping
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<std::uint64_t> number_{0};  // of the present job
    std::atomic<int> asleep_{0};
    std::shared_ptr<Job> job_;
};

}  // namespace moe_surgery::cpu
