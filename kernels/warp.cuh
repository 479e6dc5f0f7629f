// What the 32 lanes of a warp do together, and atomics. Every lane must reach each call.
#pragma once

#include "numeric.cuh"

namespace gvit {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

GVIT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
GVIT_DEVICE int lane_index() { return thread_index() % kWarpSize; }
GVIT_DEVICE int warp_index() { return thread_index() / kWarpSize; }

// ---- primitives: CUDA's own, or the host run's exchange between fibers -------------------------------------

#if defined(__CUDACC__)

template <class T>
GVIT_DEVICE T shuffle(T value, int source_lane) {
    return __shfl_sync(kAllLanes, value, source_lane);
}

template <class T>
GVIT_DEVICE T shuffle_xor(T value, int lane_mask) {
    return __shfl_xor_sync(kAllLanes, value, lane_mask);
}

// Bit i is lane i's predicate.
GVIT_DEVICE unsigned ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }

// Orders the memory accesses of the lanes; a shuffle alone does not.
GVIT_DEVICE void sync_warp() { __syncwarp(); }

GVIT_DEVICE int count_bits(unsigned bits) { return __popc(bits); }
GVIT_DEVICE int lowest_bit(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }

template <class T>
GVIT_DEVICE T atomic_add(T* address, T value) {
    if constexpr (sizeof(T) == 8) {
        // Two's complement: a signed sum is the unsigned one.
        return static_cast<T>(
            atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value)));
    } else {
        return atomicAdd(address, value);
    }
}

#else

template <class T>
GVIT_DEVICE T shuffle(T value, int source_lane GVIT_WHERE) {
    return host::exchanged<T>(host::exchange(&value, sizeof value, where), source_lane % kWarpSize);
}

template <class T>
GVIT_DEVICE T shuffle_xor(T value, int lane_mask GVIT_WHERE) {
    return host::exchanged<T>(host::exchange(&value, sizeof value, where), lane_index() ^ lane_mask);
}

GVIT_DEVICE unsigned ballot(bool predicate GVIT_WHERE) {
    const auto* lanes = host::exchange(&predicate, sizeof predicate, where);
    unsigned bits = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) bits |= unsigned{host::exchanged<bool>(lanes, lane)} << lane;
    return bits;
}

GVIT_DEVICE void sync_warp(GVIT_WHERE_ONLY) { host::sync_warp(where); }

GVIT_DEVICE int count_bits(unsigned bits) { return __builtin_popcount(bits); }
GVIT_DEVICE int lowest_bit(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }

template <class T>
T atomic_add(T* address, T value) {
    return host::atomic_add(address, value);
}

#endif

// ---- reductions: every lane gets the result, added in the same order each time ------------------------------

template <class T>
GVIT_DEVICE T warp_sum(T value GVIT_WHERE) {
    GVIT_UNROLL
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask GVIT_PASS_WHERE);
    return value;
}

template <class T>
GVIT_DEVICE T warp_max(T value GVIT_WHERE) {
    GVIT_UNROLL
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask GVIT_PASS_WHERE));
    return value;
}

}  // namespace gvit
