// Matrix fragments, tensor-core products and asynchronous copies, each with a plain equivalent for the host.
//
// All functions are warp-wide unless they say otherwise. Fragments follow the PTX layout of mma.m16n8k16: of a
// 16 x 8 result, lane i holds rows i/4 and i/4 + 8, columns 2 (i % 4) and the next one.
#pragma once

#include "warp.cuh"

namespace gvit {

// ---- primitives -------------------------------------------------------------------------------------------

#if defined(__CUDACC__)

GVIT_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit elements; lanes 8m..8m+7 give the rows of matrix m, each 16 bytes, aligned.
template <bool kTranspose>
GVIT_DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row) {
    const uint32_t address = shared_address(row);
    if constexpr (kTranspose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                     : "r"(address)
                     : "memory");
    }
}

#define GVIT_MMA(type)                                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// sum [16, 8] += a [16, 16] b [16, 8], in float32.
template <class T>
GVIT_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
    if constexpr (kIsBfloat16<T>) {
        GVIT_MMA("bf16");
    } else {
        GVIT_MMA("f16");
    }
}
#undef GVIT_MMA

// One thread's 16 bytes from global to shared memory, or zeros; they arrive at the wait.
GVIT_DEVICE void async_copy(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
GVIT_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
GVIT_DEVICE void async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

#else

template <bool kTranspose>
GVIT_DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row GVIT_WHERE) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        host::fault("matrix row not 16-byte aligned (%s:%d)", where.file, where.line);
    const auto* lanes = host::exchange(&row, sizeof row, where);
    const int outer = lane_index() / 4, inner = 2 * (lane_index() % 4);
    for (int matrix = 0; matrix < 4; ++matrix) {
        const auto element = [&](int i, int j) -> uint32_t {
            return host::exchanged<const uint16_t*>(lanes, 8 * matrix + (kTranspose ? j : i))[kTranspose ? i : j];
        };
        fragment[matrix] = element(outer, inner) | element(outer, inner + 1) << 16;
    }
}

template <class T>
GVIT_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b GVIT_WHERE) {
    host::multiply_fragments(sum, a, b, [](uint16_t bits) { return to_float(T{bits}); }, where);
}

GVIT_DEVICE void async_copy(void* shared, const void* global, bool valid) {
    host::async_copy(shared, global, 16, valid ? 16 : 0);
}
GVIT_DEVICE void async_commit() { host::async_commit(); }
template <int kGroupsLeft>
GVIT_DEVICE void async_wait() {
    host::async_wait(kGroupsLeft);
}

#endif

// ---- products of tiles in shared memory ---------------------------------------------------------------------

// How an operand lies in memory: with the summed index running along its rows, or down them.
enum class Sum { along_rows, down_rows };

// A warp's result: 16 rows, 8 kBlocks columns.
template <int kBlocks>
struct Accumulator {
    float value[kBlocks][4];

    GVIT_DEVICE void clear() {
        GVIT_UNROLL
        for (int n = 0; n < kBlocks; ++n) {
            GVIT_UNROLL
            for (int i = 0; i < 4; ++i) value[n][i] = 0.0f;
        }
    }

    // The two rows that a lane holds, each times its own factor.
    GVIT_DEVICE void scale_rows(const float (&factor)[2]) {
        GVIT_UNROLL
        for (int n = 0; n < kBlocks; ++n) {
            GVIT_UNROLL
            for (int i = 0; i < 4; ++i) value[n][i] *= factor[i / 2];
        }
    }
};

// Where value[n][i] lies in the 16 x 8 kBlocks result.
GVIT_DEVICE int fragment_row(int i) { return lane_index() / 4 + 8 * (i / 2); }
GVIT_DEVICE int fragment_column(int n, int i) { return 8 * n + 2 * (lane_index() % 4) + i % 2; }

// Writes a result to shared memory, rounded to T.
template <int kBlocks, class T>
GVIT_DEVICE void put_fragment(const Accumulator<kBlocks>& sum, T* to, int stride) {
    GVIT_UNROLL
    for (int n = 0; n < kBlocks; ++n) {
        GVIT_UNROLL
        for (int i = 0; i < 4; i += 2) {
            const Pack<T, 2> pair{{from_float<T>(sum.value[n][i]), from_float<T>(sum.value[n][i + 1])}};
            *reinterpret_cast<Pack<T, 2>*>(to + fragment_row(i) * stride + fragment_column(n, i)) = pair;
        }
    }
}

// float32 without tensor cores (their float32 has 10 bits): each lane sums what it holds.
template <Sum kA, Sum kB, int kBlocks>
GVIT_DEVICE void multiply(Accumulator<kBlocks>& sum, const float* a, int a_stride, const float* b, int b_stride,
                          int depth) {
    GVIT_UNROLL_BY(2)
    for (int k = 0; k < depth; ++k) {
        float left[2];
        GVIT_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int row = fragment_row(2 * i);
            left[i] = kA == Sum::along_rows ? a[row * a_stride + k] : a[k * a_stride + row];
        }
        GVIT_UNROLL
        for (int n = 0; n < kBlocks; ++n) {
            GVIT_UNROLL
            for (int j = 0; j < 2; ++j) {
                const int column = fragment_column(n, j);
                const float right = kB == Sum::along_rows ? b[column * b_stride + k] : b[k * b_stride + column];
                sum.value[n][j] += left[0] * right;
                sum.value[n][2 + j] += left[1] * right;
            }
        }
    }
}

// sum += A B for the warp's 16 rows of A and 8 kBlocks columns of B; depth is a multiple of 16.
template <Sum kA, Sum kB, int kBlocks, class T>
GVIT_DEVICE void multiply(Accumulator<kBlocks>& sum, const T* a, int a_stride, const T* b, int b_stride, int depth) {
    static_assert(sizeof(T) == 2 && kBlocks % 2 == 0, "matrices are loaded in fours");
    constexpr bool a_down = kA == Sum::down_rows, b_down = kB == Sum::down_rows;
    // Each lane names one row of the four 8 x 8 matrices: those of A are (row, k) = (0, 0), (8, 0), (0, 8), (8, 8),
    // those of B (column, k) = (0, 0), (0, 8), (8, 0), (8, 8).
    const int within = lane_index() % 8, bit0 = lane_index() / 8 % 2, bit1 = lane_index() / 16;
    const T* a_row =
        a_down ? a + (8 * bit1 + within) * a_stride + 8 * bit0 : a + (8 * bit0 + within) * a_stride + 8 * bit1;
    const T* b_row =
        b_down ? b + (8 * bit0 + within) * b_stride + 8 * bit1 : b + (8 * bit1 + within) * b_stride + 8 * bit0;
    GVIT_UNROLL_BY(2)
    for (int k = 0; k < depth; k += 16) {
        uint32_t left[4];
        load_matrices<a_down>(left, a_row + (a_down ? k * a_stride : k));
        GVIT_UNROLL
        for (int n = 0; n < kBlocks; n += 2) {
            uint32_t right[4];
            load_matrices<b_down>(right, b_row + (b_down ? k * b_stride + 8 * n : k + 8 * n * b_stride));
            multiply_fragments<T>(sum.value[n], left, right);
            multiply_fragments<T>(sum.value[n + 1], left, right + 2);
        }
    }
}

}  // namespace gvit
