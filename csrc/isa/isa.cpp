#include "isa.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace moe_surgery::isa {

#if defined(__x86_64__)
namespace {

// F16C, whose name older compilers' __builtin_cpu_supports does not know.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

}  // namespace
#endif

bool supported(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (isa) {
        case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
        case Isa::avx512: return avx512;
        case Isa::avx512vnni: return avx512 && __builtin_cpu_supports("avx512vnni");
        default: return isa == Isa::scalar;
    }
#elif defined(__aarch64__)
    return isa == Isa::neon || isa == Isa::scalar;
#else
    return isa == Isa::scalar;
#endif
}

}  // namespace moe_surgery::isa
