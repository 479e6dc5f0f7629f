// Compiles the file named by GVIT_KERNELS once per instruction set, each in a namespace of its own:
//
//     #define GVIT_KERNELS "csrc/gumbel_assign_cpu_kernels.h"
//     #include "csrc/cpu_levels.h"
//     ... GVIT_BEST(function)(arguments) calls the function of the best level that the processor has
//
// With GVIT_BFLOAT_LEVEL defined, also for `avx512_bfloat`, where pairs of bfloat16 can be multiplied: to be called
// by name where has_bfloat_products().
//
// `dispatch` (csrc/cpu_dispatch.h) serves loops that the compiler vectorises by itself. The kernels here are
// written in the compiler's vector types, whose width is fixed where they are parsed, and so are parsed again
// for every level; plain C++ compiles them for any processor, with 16-byte vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "csrc/cpu_dispatch.h"
#include "csrc/launchers.h"
#include "kernels/philox.cuh"

#define GVIT_LEVEL plain
#define GVIT_VECTOR_BYTES 16
#if defined(__aarch64__)
#define GVIT_VECTOR_REGISTERS 32
#else
#define GVIT_VECTOR_REGISTERS 16
#endif
#include "csrc/cpu_level.h"

#if GVIT_X86_LEVELS

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define GVIT_LEVEL avx2
#define GVIT_VECTOR_BYTES 32
#define GVIT_VECTOR_REGISTERS 16
#include "csrc/cpu_level.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define GVIT_LEVEL avx512
#define GVIT_VECTOR_BYTES 64
#define GVIT_VECTOR_REGISTERS 32
#include "csrc/cpu_level.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(GVIT_BFLOAT_LEVEL)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define GVIT_LEVEL avx512_bfloat
#define GVIT_VECTOR_BYTES 64
#define GVIT_VECTOR_REGISTERS 32
#define GVIT_BFLOAT_PRODUCTS 1
#include "csrc/cpu_level.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#define GVIT_BEST(function)                                                      \
    (::gvit::cpu_level() == ::gvit::CpuLevel::avx512 ? &::gvit::avx512::function \
     : ::gvit::cpu_level() == ::gvit::CpuLevel::avx2 ? &::gvit::avx2::function   \
                                                     : &::gvit::plain::function)
#else
#define GVIT_BEST(function) (&::gvit::plain::function)
#endif
