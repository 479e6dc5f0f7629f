// Instruction sets chosen at run time. A CPU kernel is a struct with a static, always-inlined `run`;
// `dispatch` compiles it once for each level and calls the best one that the processor has.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define GVIT_X86_LEVELS 1
#else
#define GVIT_X86_LEVELS 0
#endif

#define GVIT_INLINE __attribute__((always_inline)) inline

namespace gvit {

enum class CpuLevel { plain, avx2, avx512 };

inline CpuLevel detected_cpu_level() {
#if GVIT_X86_LEVELS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return CpuLevel::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::avx2;
#endif
    return CpuLevel::plain;
}

// GROUPVIT_CPU=plain|avx2 lowers the level, and avx512 hides has_bfloat_products(), so that tests reach every variant
// on one machine.
inline CpuLevel cpu_level() {
    static const CpuLevel level = [] {
        const CpuLevel detected = detected_cpu_level();
        const char* wish = std::getenv("GROUPVIT_CPU");
        if (wish == nullptr) return detected;
        if (std::strcmp(wish, "plain") == 0) return CpuLevel::plain;
        if (std::strcmp(wish, "avx2") == 0 && detected == CpuLevel::avx512) return CpuLevel::avx2;
        return detected;
    }();
    return level;
}

// Whether the processor multiplies pairs of bfloat16, beside the level avx512.
inline bool has_bfloat_products() {
#if GVIT_X86_LEVELS
    static const bool found = [] {
        const char* wish = std::getenv("GROUPVIT_CPU");
        const bool hidden = wish != nullptr && std::strcmp(wish, "avx512") == 0;
        return cpu_level() == CpuLevel::avx512 && __builtin_cpu_supports("avx512bf16") && !hidden;
    }();
    return found;
#else
    return false;
#endif
}

#if GVIT_X86_LEVELS
template <class Kernel, class... Arguments>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"))) void run_avx512(
    const Arguments&... arguments) {
    Kernel::run(arguments...);
}

template <class Kernel, class... Arguments>
__attribute__((target("avx2,fma,f16c"))) void run_avx2(const Arguments&... arguments) {
    Kernel::run(arguments...);
}
#endif

template <class Kernel, class... Arguments>
void dispatch(const Arguments&... arguments) {
#if GVIT_X86_LEVELS
    if (cpu_level() == CpuLevel::avx512) return run_avx512<Kernel>(arguments...);
    if (cpu_level() == CpuLevel::avx2) return run_avx2<Kernel>(arguments...);
#endif
    Kernel::run(arguments...);
}

}  // namespace gvit
