// Reads in the background: several in flight, the urgent ones first, without Python.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

namespace moe_surgery::residency {

// `bytes` bytes of whole blocks at `offset` of the file `fd` to `to`, of which the first `needed` must be there.
struct Piece {
    int fd;
    std::int64_t offset;
    std::uint8_t* to;
    std::ptrdiff_t bytes, needed;
};

// How a load stands: `code` is 0, an errno, or kCutShort; `piece` the first that failed.
struct Outcome {
    bool finished;
    int code;
    std::ptrdiff_t piece;
};
constexpr int kCutShort = -1;
constexpr int kClasses = 3;

// See moe_surgery.runtime.residency.reads.Reads, which specifies it. One thread calls the methods.
class Reads {
  public:
    explicit Reads(int threads);
    ~Reads();

    // Read `pieces` after the others of their class (0 is the most urgent); returns the load's number.
    std::int64_t start(std::vector<Piece> pieces, int kind);
    void hurry(std::int64_t load);
    // Forget what has not begun; its `needed` bytes.
    std::ptrdiff_t cancel(std::int64_t load);
    Outcome outcome(std::int64_t load) const;
    // Wait up to `milliseconds` for one of `loads` to finish; its number, or -1.
    std::int64_t wait(const std::vector<std::int64_t>& loads, int milliseconds);
    void forget(std::int64_t load);
    std::int64_t bytes() const;
    // End the threads after the pieces that they are reading, and wait for that: memory may be freed then.
    void close();

  private:
    struct Load {
        std::vector<Piece> pieces;
        std::size_t next = 0;
        std::size_t unfinished = 0;
        int kind = 0, code = 0;
        std::ptrdiff_t failed = 0;
        bool forgotten = false;
    };

    void work();
    void drop(Load& load, std::int64_t number);

    mutable std::mutex guard_;
    std::condition_variable added_, ended_;
    std::map<std::int64_t, Load> loads_;
    std::deque<std::int64_t> waiting_[kClasses];
    std::vector<std::thread> threads_;
    const std::size_t count_;  // of threads
    std::int64_t number_ = 0, bytes_ = 0;
    std::size_t running_later_ = 0;  // pieces of classes after the first
    bool closed_ = false;
};

}  // namespace moe_surgery::residency
