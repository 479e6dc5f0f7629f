// Small kernels that show what the host run sees: sound ones, and one for each fault.
//
// test_detectors.py runs every PROBE by name on one block of 64 threads (the `blocks` probes on two) with a
// float tensor of 64 elements. A comment "finds: words" gives the words that the error must contain;
// where it stands on a line of code, the error must also name that line. A probe without one must pass.
#include <cstring>
#include <stdexcept>

#include "kernels/mma.cuh"
#include "kernels/warp.cuh"

namespace gvit {
namespace {

constexpr int kThreads = 64;
using Row = Pack<float, 4>;

struct Probe {
    const char* name;
    void (*kernel)(float*);
    int blocks;
    size_t shared_bytes;
};

#define PROBE(name) GVIT_GLOBAL(kThreads) name([[maybe_unused]] float* data)

PROBE(block_sum) {
    GVIT_SHARED(float, part, 2);
    const float sum = warp_sum(data[thread_index()]);
    if (lane_index() == 0) part[warp_index()] = sum;
    GVIT_SYNC();
    data[thread_index()] = part[0] + part[1];
}

PROBE(reversal_through_dynamic_memory) {
    GVIT_DYNAMIC_SHARED(memory);
    float* const row = reinterpret_cast<float*>(memory);
    row[thread_index()] = data[thread_index()];
    GVIT_SYNC();
    data[thread_index()] = row[kThreads - 1 - thread_index()];
}

PROBE(warp_sync_orders_a_warp) {
    GVIT_SHARED(float, row, kThreads);
    row[thread_index()] = data[thread_index()];
    sync_warp();
    data[thread_index()] = row[thread_index() ^ 1];
}

PROBE(votes_and_shuffles) {
    const unsigned bits = ballot(lane_index() % 3 == 0);
    const float first = shuffle(data[thread_index()], lowest_bit(bits));
    data[thread_index()] = first + static_cast<float>(count_bits(bits)) + warp_max(data[thread_index()]);
}

PROBE(atomics) {
    GVIT_SHARED(int, count, 1);
    if (thread_index() == 0) count[0] = 0;
    GVIT_SYNC();
    atomic_add(count, 1);
    GVIT_SYNC();
    data[thread_index()] = static_cast<float>(count[0]);
}

PROBE(asynchronous_copy) {
    GVIT_SHARED(Row, rows, kThreads);
    const bool valid = thread_index() < kThreads / 4;
    async_copy(rows + thread_index(), data + (valid ? 4 * thread_index() : 0), valid);
    async_commit();
    async_wait<0>();
    GVIT_SYNC();
    const auto* const row = reinterpret_cast<const float*>(rows);
    data[thread_index()] = row[thread_index()] + row[kThreads + thread_index()];
}

PROBE(barrier_in_a_branch) {
    if (thread_index() != 5) {
        GVIT_SYNC();  // finds: barrier not reached by every thread: thread 63 waits at the barrier
    }
}

PROBE(barriers_on_two_lines) {
    // finds: barrier not reached by every thread: thread 63 waits at the barrier
    if (thread_index() < 32) {
        GVIT_SYNC();
    } else {
        GVIT_SYNC();
    }
}

PROBE(shuffle_in_a_branch) {
    if (lane_index() < 16) {
        data[0] = shuffle_xor(data[thread_index()], 1);  // finds: warp-wide operation not reached by every thread
    }
}

PROBE(shuffle_while_others_wait) {
    // finds: waits at the barrier
    if (lane_index() == 7) warp_sum(1.0f);
    GVIT_SYNC();
}

PROBE(no_barrier_between_warps) {
    GVIT_SHARED(float, row, kThreads);
    row[thread_index()] = data[thread_index()];
    sync_warp();
    data[thread_index()] = row[thread_index() / 32 * 31];  // finds: race
}

PROBE(no_sync_within_a_warp) {
    GVIT_SHARED(float, row, kThreads);
    row[thread_index()] = data[thread_index()];
    shuffle(0.0f, 0);
    if (lane_index() > 0) data[thread_index()] = row[thread_index() - 1];  // finds: race
}

PROBE(write_after_read) {
    GVIT_SHARED(float, row, kThreads);
    row[thread_index()] = 0.0f;
    GVIT_SYNC();
    const float neighbour = row[(thread_index() + 1) % kThreads];
    row[thread_index()] = neighbour;  // finds: race
}

PROBE(two_writers) {
    GVIT_SHARED(float, row, 1);
    row[0] = data[thread_index()];  // finds: race
}

PROBE(plain_read_of_an_atomic) {
    GVIT_SHARED(int, count, 1);
    if (thread_index() == 0) count[0] = 0;
    GVIT_SYNC();
    atomic_add(count, 1);
    if (thread_index() == 63) data[0] = static_cast<float>(count[0]);  // finds: race
}

PROBE(shared_memory_not_written) {
    GVIT_SHARED(float, row, kThreads);
    if (thread_index() != 9) row[thread_index()] = 1.0f;
    GVIT_SYNC();
    data[thread_index()] = row[thread_index()];  // finds: never written
}

PROBE(past_a_shared_array) {
    GVIT_SHARED(float, row, kThreads);
    row[thread_index() + 1] = 1.0f;  // finds: outside every tensor and shared array
}

PROBE(past_dynamic_memory) {
    GVIT_DYNAMIC_SHARED(memory);
    memory[4 * kThreads + thread_index()] = 0;  // finds: outside every tensor and shared array
}

PROBE(past_a_tensor) {
    if (data[thread_index() + 1] < 0.0f) data[0] = 1.0f;  // finds: outside every tensor and shared array
}

PROBE(blocks_write_the_same) {
    data[thread_index()] = 1.0f;  // finds: of another block
}

PROBE(copy_not_waited_for) {
    GVIT_SHARED(Row, rows, kThreads);
    async_copy(rows + thread_index(), data, true);
    async_commit();
    async_wait<1>();
    GVIT_SYNC();
    data[thread_index()] = rows[thread_index()].element[0];  // finds: before the wait
}

PROBE(copy_never_waited_for) {
    // finds: ended with asynchronous copies in flight
    GVIT_SHARED(Row, rows, kThreads);
    async_copy(rows + thread_index(), data, true);
    async_commit();
}

PROBE(copy_seen_without_a_barrier) {
    GVIT_SHARED(Row, rows, kThreads);
    async_copy(rows + thread_index(), data, true);
    async_commit();
    async_wait<0>();
    if (thread_index() > 0) data[thread_index()] = rows[thread_index() - 1].element[0];  // finds: race
}

PROBE(misaligned_pack) {
    GVIT_SHARED(float, row, kThreads);
    row[thread_index()] = 0.0f;
    GVIT_SYNC();
    const auto pack = *reinterpret_cast<const Pack<float, 4>*>(row + 1);  // finds: misaligned
    if (thread_index() == 0) data[0] = pack.element[0];
}

PROBE(index_overflow) {
    const int huge = 0x7FFFFFF0 + thread_index();  // finds: integer overflow
    data[thread_index()] = static_cast<float>(huge);
}

PROBE(too_much_shared_memory) {
    // finds: not every target has them
    GVIT_SHARED(float, row, 30 * 1024);
    row[thread_index()] = 1.0f;
}

int a_global = 0;
PROBE(global_variable_written) {
    if (data[0] == 0.0f) a_global = thread_index();  // finds: outside every tensor and shared array
    GVIT_SYNC();
    data[thread_index()] = static_cast<float>(a_global);
}

constexpr size_t kRowBytes = kThreads * sizeof(float);
#define ONE_BLOCK(name) {#name, name, 1, kRowBytes}
const Probe kProbes[] = {
    ONE_BLOCK(block_sum),
    ONE_BLOCK(reversal_through_dynamic_memory),
    ONE_BLOCK(warp_sync_orders_a_warp),
    ONE_BLOCK(votes_and_shuffles),
    ONE_BLOCK(atomics),
    ONE_BLOCK(asynchronous_copy),
    ONE_BLOCK(barrier_in_a_branch),
    ONE_BLOCK(barriers_on_two_lines),
    ONE_BLOCK(shuffle_in_a_branch),
    ONE_BLOCK(shuffle_while_others_wait),
    ONE_BLOCK(no_barrier_between_warps),
    ONE_BLOCK(no_sync_within_a_warp),
    ONE_BLOCK(write_after_read),
    ONE_BLOCK(two_writers),
    ONE_BLOCK(plain_read_of_an_atomic),
    ONE_BLOCK(shared_memory_not_written),
    ONE_BLOCK(past_a_shared_array),
    ONE_BLOCK(past_dynamic_memory),
    ONE_BLOCK(past_a_tensor),
    {"blocks_write_the_same", blocks_write_the_same, 2, kRowBytes},
    ONE_BLOCK(copy_not_waited_for),
    ONE_BLOCK(copy_never_waited_for),
    ONE_BLOCK(copy_seen_without_a_barrier),
    ONE_BLOCK(misaligned_pack),
    ONE_BLOCK(index_overflow),
    ONE_BLOCK(too_much_shared_memory),
    ONE_BLOCK(global_variable_written),
};

}  // namespace

void launch_probe(const char* name, float* data) {
    for (const Probe& probe : kProbes) {
        if (std::strcmp(probe.name, name) != 0) continue;
        GVIT_LAUNCH(probe.kernel, probe.blocks, kThreads, probe.shared_bytes, nullptr, data);
        return;
    }
    throw std::runtime_error("no such probe");
}

}  // namespace gvit
