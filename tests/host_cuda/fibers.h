// The block that is running now, shared by the scheduler and the memory checks.
#pragma once

#include <vector>

#include "host_cuda.h"

// What Python calls.
#define GVIT_EXPORT extern "C" __attribute__((visibility("default")))

namespace gvit::host {

enum class State { ready, at_warp, at_barrier, finished, faulted };

struct Fiber {
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;  // lowest address
    State state = State::finished;
    Where where{"", 0};
    dim3 index;
};

struct Warp {
    int64_t sync_epoch = 0;  // changes at each sync_warp: what orders memory within the warp
    int exchanges = 0;       // the parity says which slots are in use
    Slot slots[2][kWarpSize];
};

// A thread's place in time: two accesses are ordered when a barrier or warp sync lies between them.
struct Moment {
    int64_t launch = 0, block = 0, barrier = 0, warp_sync = 0;
    int thread = -1;
};

// What the launches since the last look did with tensors: bytes that their threads asked for.
struct Traffic {
    int64_t launches = 0, read = 0, written = 0;
};
extern Traffic traffic;

bool in_kernel();
Moment now();
bool on_own_stack(const void* address);
const LaunchConfig& running();

// Called by the scheduler.
void begin_block(size_t shared_bytes);
void end_block();

}  // namespace gvit::host
