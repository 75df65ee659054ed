// A thread pool: idle threads spin for a while, then sleep.
//
// Work is cut into pieces, and a phase ends when its pieces are done, not when every thread has arrived: a thread
// that is not scheduled delays the others only while it works on a piece.
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
    // The process's pool. After a fork the child starts a new one.
    static Pool& shared();

    // Runs the phases one after the other on `threads` threads including the caller's, numbered from 0.
    // Concurrent calls are serialised. `work` must not throw or call `run`.
    void run(int threads, std::vector<Phase> phases);

    // Running threads, without the caller's.
    int workers() const { return static_cast<int>(workers_.size()); }

  private:
    void serve(int thread, std::uint64_t last);
    std::shared_ptr<Job> next(std::uint64_t& last);

    std::mutex turn_;  // held while a job runs
    std::mutex guard_;  // guards job_ and sleeping
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<std::uint64_t> number_{0};  // of the current job
    std::atomic<int> asleep_{0};
    std::shared_ptr<Job> job_;
};

}  // namespace moe_surgery::cpu
