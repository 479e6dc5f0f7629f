// What a CUDA kernel sees when it is compiled by the host compiler and run on the CPU.
//
// Each thread of a block is a fiber; blocks run one after the other. Fibers switch only where CUDA would
// synchronise, so a run is deterministic, and the faults a GPU would suffer silently become exceptions:
//   - a barrier, shuffle or matrix instruction that some thread does not reach (fibers.cpp);
//   - shared memory read before it was written, or touched by two threads with no barrier between;
//   - global memory touched outside the tensors, written by two blocks, or read before it was written;
//   - an asynchronous copy used before it was waited for (all memory_checks.cpp).
// Included through kernels/portability.cuh with GVIT_HOST_CUDA defined, never directly.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = struct CUstream_st*;

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace gvit::host {

constexpr int kWarpSize = 32;

struct Where {
    const char* file;
    int line;
    static Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Ends the launch; the launch throws std::runtime_error with this text and where the thread was.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

void sync_block(Where where);
void sync_warp(Where where);

// What each lane hands to the others in one warp-wide operation.
struct alignas(8) Slot {
    unsigned char bytes[64];
};

// Waits for all lanes and returns the 32 slots, valid until the next warp-wide operation.
const Slot* exchange(const void* deposit, size_t size, Where where);

// The shim's own memory is none of the kernel's: what runs inside a kernel but is not part of it.
#define GVIT_UNCHECKED __attribute__((noinline, no_sanitize("thread")))

template <class T>
GVIT_UNCHECKED T exchanged(const Slot* slots, int lane) {
    T value;
    std::memcpy(&value, slots[lane].bytes, sizeof value);
    return value;
}

// The tensor core's product, from the fragments of all lanes; decode turns an element's bits into its value.
void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b, float (*decode)(uint16_t),
                        Where where);

unsigned char* dynamic_shared();
void* static_shared(size_t size, Where where);

// cp.async: the bytes arrive at the wait, no earlier. Those past `valid` become zero.
void async_copy(void* shared, const void* global, int size, int valid);
void async_commit();
void async_wait(int groups_left);

enum class Access { read, write, atomic };
void check_access(const void* address, size_t size, Access access, const void* code);

template <class T>
GVIT_UNCHECKED T atomic_add(T* address, T value) {
    check_access(address, sizeof(T), Access::atomic, __builtin_return_address(0));
    const T before = *address;
    *address = before + value;
    return before;
}

struct LaunchConfig {
    const char* kernel;
    dim3 grid, block;
    size_t shared_bytes;
    void (*thread)(const void* parameters);
    const void* parameters;
    size_t parameter_bytes;
};

void run_grid(const LaunchConfig& config);

// The kernel and its arguments: all of a launch that its threads may read.
template <class... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
    static void run(const void* call) {
        std::apply(static_cast<const Call*>(call)->kernel, static_cast<const Call*>(call)->parameters);
    }
};

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
    const Call<Parameters...> call{kernel, {arguments...}};
    run_grid({name, grid, block, shared_bytes, Call<Parameters...>::run, &call, sizeof call});
}

}  // namespace gvit::host

namespace gvit {
// So few that every loop over work items goes round.
constexpr int64_t kMaxBlocks = 3;
}  // namespace gvit

#define GVIT_HD inline
#define GVIT_DEVICE inline
#define GVIT_GLOBAL(...) inline void
#define GVIT_UNROLL
#define GVIT_UNROLL_BY(count)

#define GVIT_SYNC() ::gvit::host::sync_block(::gvit::host::Where::here())
#define GVIT_DYNAMIC_SHARED(name) unsigned char* const name = ::gvit::host::dynamic_shared()
#define GVIT_SHARED(type, name, count) \
    type* const name =                 \
        static_cast<type*>(::gvit::host::static_shared(sizeof(type) * (count), ::gvit::host::Where::here()))

#define GVIT_WHERE_ONLY ::gvit::host::Where where = ::gvit::host::Where::here()
#define GVIT_WHERE , GVIT_WHERE_ONLY
#define GVIT_PASS_WHERE_ONLY where
#define GVIT_PASS_WHERE , where

#define GVIT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ::gvit::host::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
