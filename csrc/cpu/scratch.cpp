#include "scratch.hpp"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moe_surgery::cpu {

void* allocate_scratch(std::size_t nbytes) {
    void* memory = nullptr;
    const bool large = nbytes >= kHugePage;
    if (posix_memalign(&memory, large ? kHugePage : 64, nbytes) != 0) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    // Whole huge pages alone; a system without them says no, which changes nothing else.
    if (large) (void)madvise(memory, nbytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    return memory;
}

void free_scratch(void* memory) { std::free(memory); }

}  // namespace moe_surgery::cpu
