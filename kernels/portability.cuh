// The one place that knows nvcc from a host compiler.
//
// Everything under kernels/ is written once and compiled in three ways:
//   nvcc                    the CUDA library;
//   g++ -DGVIT_HOST_CUDA    the same kernels and launch code on the CPU, threads as fibers
//                           (tests/host_cuda), where every rule below is checked;
//   any C++17 compiler      only the GVIT_HD formulas, for the CPU operators in csrc/.
//
// Rules that keep a kernel runnable in all of them: launch through GVIT_LAUNCH only, take shared memory
// from the two macros below only, and let every thread of a block reach each GVIT_SYNC and every lane of a
// warp each function of warp.cuh and mma.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define GVIT_HD __host__ __device__ __forceinline__
#define GVIT_DEVICE __device__ __forceinline__
// GVIT_GLOBAL(threads) or GVIT_GLOBAL(threads, blocks): the most threads of a block, and how many blocks a
// multiprocessor shall hold at least (which bounds the registers).
#define GVIT_GLOBAL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define GVIT_PRAGMA(text) _Pragma(#text)
#define GVIT_UNROLL GVIT_PRAGMA(unroll)
#define GVIT_UNROLL_BY(count) GVIT_PRAGMA(unroll count)

// A barrier for all threads of the block.
#define GVIT_SYNC() __syncthreads()

// Declares `unsigned char* name`, 16-byte aligned: the shared memory whose size was given at launch.
#define GVIT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// Declares `count` elements of shared memory, count known at compile time.
#define GVIT_SHARED(type, name, count) __shared__ type name[count]

// Functions of a whole warp or block take this as their last parameter; the host run puts the caller's
// file and line there, nvcc sees nothing.
#define GVIT_WHERE_ONLY
#define GVIT_WHERE
#define GVIT_PASS_WHERE_ONLY
#define GVIT_PASS_WHERE

namespace gvit {

constexpr int64_t kMaxBlocks = 0x7FFFFFFF;  // along x

// More than 48 KB of shared memory must be asked for, once per kernel and device. A failure stays in
// cudaGetLastError, as for a launch.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
    constexpr size_t without_asking = 48 * 1024;
    if (shared_bytes > without_asking) {
        const auto status =
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
        if (status != cudaSuccess) return;
    }
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
}

}  // namespace gvit

// GVIT_LAUNCH((kernel<float>), grid, block, shared_bytes, stream, argument...)
#define GVIT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ::gvit::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#elif defined(GVIT_HOST_CUDA)

#include "host_cuda.h"

#else

// Forced, so that a formula takes on the instruction set of the CPU operator that calls it.
#define GVIT_HD __attribute__((always_inline)) inline

// The type that CUDA's own header declares, for the signatures of the launch functions.
using cudaStream_t = struct CUstream_st*;

#endif
