#include "isa.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe_surgery::isa {

#if defined(__x86_64__)
namespace {

// F16C, whose name older compilers' __builtin_cpu_supports does not know.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// The names of BF16 and AMX are newer than some compilers'.
bool has_avx512_bf16() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

bool has_amx() {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) && (d & kInt8);
}

// Whether the system lets this process use AMX's tiles, whose registers are too large to be saved for every
// process: it has to ask, once for all of its threads.
bool tiles_permitted() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return permitted;
#else
    return false;
#endif
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
        case Isa::avx512bf16: return supported(Isa::avx512vnni) && has_avx512_bf16();
        case Isa::amx: return supported(Isa::avx512bf16) && has_amx() && tiles_permitted();
        default: return isa == Isa::scalar;
    }
#elif defined(__aarch64__)
    return isa == Isa::neon || isa == Isa::scalar;
#else
    return isa == Isa::scalar;
#endif
}

}  // namespace moe_surgery::isa
