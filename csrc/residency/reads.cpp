#include "reads.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <utility>

namespace moe_surgery::residency {
namespace {

constexpr std::int64_t kBlock = 4096;

// 0, an errno, or kCutShort.
int read_piece(const Piece& piece) {
    std::ptrdiff_t done = 0;
    while (done < piece.needed) {
        const std::ptrdiff_t start = done - done % kBlock;  // direct reads begin at a block
        const ssize_t count = pread(piece.fd, piece.to + start, static_cast<std::size_t>(piece.bytes - start), piece.offset + start);
        if (count < 0) {
            if (errno == EINTR) continue;
            return errno;
        }
        if (start + count <= done) return kCutShort;
        done = start + count;
    }
    return 0;
}

}  // namespace

Reads::Reads(int threads) : count_(static_cast<std::size_t>(threads)) {
    const std::lock_guard<std::mutex> lock(guard_);
    for (int i = 0; i < threads; ++i) threads_.emplace_back(&Reads::work, this);
}

Reads::~Reads() { close(); }

std::int64_t Reads::start(std::vector<Piece> pieces, int kind) {
    const std::lock_guard<std::mutex> lock(guard_);
    const std::int64_t number = ++number_;
    Load& load = loads_[number];
    load.unfinished = pieces.size();
    load.pieces = std::move(pieces);
    load.kind = kind;
    if (!load.unfinished) return number;
    waiting_[kind].push_back(number);
    for (std::size_t i = 0; i < std::min(load.unfinished, count_); ++i) added_.notify_one();
    return number;
}

void Reads::hurry(std::int64_t number) {
    const std::lock_guard<std::mutex> lock(guard_);
    Load& load = loads_.at(number);
    if (load.kind != 0 && load.next < load.pieces.size()) {
        auto& waiting = waiting_[load.kind];
        waiting.erase(std::find(waiting.begin(), waiting.end(), number));
        waiting_[0].push_back(number);
    }
    load.kind = 0;
}

void Reads::drop(Load& load, std::int64_t number) {
    auto& waiting = waiting_[load.kind];
    waiting.erase(std::find(waiting.begin(), waiting.end(), number));
    load.unfinished -= load.pieces.size() - load.next;
    load.next = load.pieces.size();
}

std::ptrdiff_t Reads::cancel(std::int64_t number) {
    const std::lock_guard<std::mutex> lock(guard_);
    Load& load = loads_.at(number);
    std::ptrdiff_t dropped = 0;
    for (std::size_t i = load.next; i < load.pieces.size(); ++i) dropped += load.pieces[i].needed;
    if (load.next < load.pieces.size()) drop(load, number);
    return dropped;
}

Outcome Reads::outcome(std::int64_t number) const {
    const std::lock_guard<std::mutex> lock(guard_);
    const Load& load = loads_.at(number);
    return {load.unfinished == 0, load.code, load.failed};
}

std::int64_t Reads::wait(const std::vector<std::int64_t>& numbers, int milliseconds) {
    std::unique_lock<std::mutex> lock(guard_);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
    for (;;) {
        for (const std::int64_t number : numbers) {
            if (loads_.at(number).unfinished == 0) return number;
        }
        if (ended_.wait_until(lock, deadline) == std::cv_status::timeout) {
            for (const std::int64_t number : numbers) {
                if (loads_.at(number).unfinished == 0) return number;
            }
            return -1;
        }
    }
}

void Reads::forget(std::int64_t number) {
    const std::lock_guard<std::mutex> lock(guard_);
    const auto found = loads_.find(number);
    if (found == loads_.end()) return;
    if (found->second.unfinished == 0) {
        loads_.erase(found);
    } else {
        found->second.forgotten = true;
    }
}

std::int64_t Reads::bytes() const {
    const std::lock_guard<std::mutex> lock(guard_);
    return bytes_;
}

void Reads::close() {
    {
        const std::lock_guard<std::mutex> lock(guard_);
        closed_ = true;
        added_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void Reads::work() {
    std::unique_lock<std::mutex> lock(guard_);
    for (;;) {
        if (closed_) return;
        // One thread is left to urgent loads, so that they begin at once.
        const int classes = count_ > 1 && running_later_ + 1 >= count_ ? 1 : kClasses;
        auto* waiting = std::find_if(waiting_, waiting_ + classes, [](const auto& loads) { return !loads.empty(); });
        if (waiting == waiting_ + classes) {
            added_.wait(lock);
            continue;
        }
        const std::int64_t number = waiting->front();
        Load& load = loads_.at(number);  // stays in place in the map
        const std::size_t index = load.next++;
        if (load.next == load.pieces.size()) waiting->pop_front();
        const Piece piece = load.pieces[index];
        const bool later = waiting != waiting_;
        running_later_ += later;
        lock.unlock();
        const int code = read_piece(piece);
        lock.lock();
        running_later_ -= later;
        bytes_ += piece.needed;
        --load.unfinished;
        if (code && !load.code) {
            load.code = code;
            load.failed = static_cast<std::ptrdiff_t>(index);
            if (load.next < load.pieces.size()) drop(load, number);
        }
        if (load.unfinished == 0) {
            if (load.forgotten) loads_.erase(number);
            ended_.notify_all();
        }
    }
}

}  // namespace moe_surgery::residency
