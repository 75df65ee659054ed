// Memory for the values between two operations.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

namespace moe_surgery::cpu {

// From this size on an array lies in huge pages, where the system has them for programs that ask: it is then filled
// by one page fault for each 2 MiB, not by 512.
constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Throws std::bad_alloc. The bytes are not initialised, and at an address that 64 divides.
void* allocate_scratch(std::size_t nbytes);
void free_scratch(void* memory);

// An array of values that are not initialised.
template <class T>
class Scratch {
    static_assert(std::is_trivially_default_constructible<T>::value && std::is_trivially_destructible<T>::value);

  public:
    Scratch() = default;
    explicit Scratch(std::ptrdiff_t count) { resize(count); }

    // Does not keep values.
    void resize(std::ptrdiff_t count) {
        if (count > capacity_) {
            memory_.reset();
            count_ = capacity_ = 0;
            memory_.reset(static_cast<T*>(allocate_scratch(static_cast<std::size_t>(count) * sizeof(T))));
            capacity_ = count;
        }
        count_ = count;
    }

    T* get() const { return memory_.get(); }
    std::ptrdiff_t size() const { return count_; }
    T& operator[](std::ptrdiff_t i) const { return memory_.get()[i]; }

  private:
    struct Free {
        void operator()(T* memory) const { free_scratch(memory); }
    };
    std::unique_ptr<T, Free> memory_;
    std::ptrdiff_t count_ = 0, capacity_ = 0;
};

}  // namespace moe_surgery::cpu
