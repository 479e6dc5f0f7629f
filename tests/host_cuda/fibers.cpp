// Threads of a block as fibers: switching, barriers, warp-wide operations, and who failed to reach them.
#include "fibers.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace gvit::host {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;

std::vector<Fiber> fibers;  // of the running block, in thread order
std::vector<Warp> warps;
Fiber scheduler;
Fiber* current = nullptr;
const LaunchConfig* config = nullptr;
std::string fault_text;
int64_t launches = 0, blocks = 0, epochs = 0, barrier_epoch = 0;

int thread_number() { return static_cast<int>(current - fibers.data()); }
int lane() { return thread_number() % kWarpSize; }
Warp& warp() { return warps[thread_number() / kWarpSize]; }

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack and goes on where the other stack left off; swapcontext
// would do, but makes two system calls a switch.
extern "C" void gvit_host_switch(void** save, void* load);
asm(R"(
    .text
    .type gvit_host_switch, @function
gvit_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

void prepare(Fiber& fiber, void (*entry)()) {
    constexpr int saved_registers = 6;
    auto* top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
    *--top = nullptr;  // a return address for entry, which never returns; also aligns the stack
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < saved_registers; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
}

void switch_stack(Fiber& from, Fiber& to) { gvit_host_switch(&from.stack_pointer, to.stack_pointer); }
#else
void prepare(Fiber& fiber, void (*entry)()) {
    if (fiber.stack_pointer == nullptr) fiber.stack_pointer = new ucontext_t;
    auto* context = static_cast<ucontext_t*>(fiber.stack_pointer);
    getcontext(context);
    context->uc_stack.ss_sp = fiber.stack;
    context->uc_stack.ss_size = kStackBytes;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}

void switch_stack(Fiber& from, Fiber& to) {
    if (from.stack_pointer == nullptr) from.stack_pointer = new ucontext_t;
    swapcontext(static_cast<ucontext_t*>(from.stack_pointer), static_cast<ucontext_t*>(to.stack_pointer));
}
#endif

// The address sanitizer is told of each change of stack, and that a stack begins anew.
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

void switch_to(Fiber& from, Fiber& to) {
    void* fake_stack = nullptr;
    const bool back = &to == &scheduler;
    __sanitizer_start_switch_fiber(&fake_stack, back ? scheduler_stack : to.stack,
                                   back ? scheduler_stack_bytes : kStackBytes);
    switch_stack(from, to);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
void arrived() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes); }
void renew(const Fiber& fiber) { __asan_unpoison_memory_region(fiber.stack, kStackBytes); }
#else
void switch_to(Fiber& from, Fiber& to) { switch_stack(from, to); }
void arrived() {}
void renew(const Fiber&) {}
#endif

void stop(State state, Where where) {
    Fiber& self = *current;
    self.state = state;
    self.where = where;
    switch_to(self, scheduler);
}

void fiber_entry() {
    arrived();
    config->thread(config->parameters);
    stop(State::finished, {"", 0});
}

void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.index;
    switch_to(scheduler, fiber);
    current = nullptr;
    if (fiber.state == State::faulted) throw std::runtime_error(fault_text);
}

bool same_place(Where a, Where b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string describe(const Fiber& fiber) {
    const char* const names[] = {"runs", "waits in a warp-wide operation", "waits at the barrier", "has ended"};
    std::string text = "thread " + std::to_string(&fiber - fibers.data()) + " " + names[static_cast<int>(fiber.state)];
    if (fiber.state != State::finished) {
        text += std::string(" at ") + fiber.where.file + ":" + std::to_string(fiber.where.line);
    }
    return text;
}

[[noreturn]] void not_together(const char* what, const Fiber& a, const Fiber& b) {
    throw std::runtime_error(std::string(what) + " not reached by every thread: " + describe(a) + ", " + describe(b) +
                             " (kernel " + config->kernel + ", block " + std::to_string(blockIdx.x) + ")");
}

// Runs one warp until all its lanes wait at the barrier or have ended.
void run_warp(size_t first, size_t last) {
    for (;;) {
        for (size_t i = first; i < last; ++i) {
            if (fibers[i].state == State::ready) resume(fibers[i]);
        }
        const Fiber* waiting = nullptr;
        for (size_t i = first; i < last; ++i) {
            if (fibers[i].state == State::at_warp) waiting = &fibers[i];
        }
        if (waiting == nullptr) return;
        for (size_t i = first; i < last; ++i) {
            const bool together = fibers[i].state == State::at_warp && same_place(fibers[i].where, waiting->where);
            if (!together) not_together("warp-wide operation", *waiting, fibers[i]);
        }
        for (size_t i = first; i < last; ++i) fibers[i].state = State::ready;
    }
}

// Releases the barrier; false when every thread has ended.
bool pass_barrier() {
    const Fiber* waiting = nullptr;
    for (const Fiber& fiber : fibers) {
        if (fiber.state == State::at_barrier) waiting = &fiber;
    }
    if (waiting == nullptr) return false;
    for (Fiber& fiber : fibers) {
        const bool together = fiber.state == State::at_barrier && same_place(fiber.where, waiting->where);
        if (!together) not_together("barrier", *waiting, fiber);
    }
    for (Fiber& fiber : fibers) fiber.state = State::ready;
    barrier_epoch = ++epochs;
    return true;
}

void run_block() {
    ++blocks;
    barrier_epoch = ++epochs;
    for (Warp& warp : warps) warp.sync_epoch = ++epochs;
    for (Fiber& fiber : fibers) {
        renew(fiber);
        prepare(fiber, fiber_entry);
        fiber.state = State::ready;
    }
    begin_block(config->shared_bytes);
    do {
        for (size_t first = 0; first < fibers.size(); first += kWarpSize) {
            run_warp(first, std::min(first + kWarpSize, fibers.size()));
        }
    } while (pass_barrier());
    end_block();
}

void make_fibers(dim3 block) {
    static auto* const stacks = static_cast<unsigned char*>(
        mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > kMaxThreads) throw std::runtime_error("a block has 1 to 1024 threads");
    fibers.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        fibers[i].stack = stacks + i * kStackBytes;
        fibers[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    }
    warps.resize((threads + kWarpSize - 1) / kWarpSize);
}

}  // namespace

bool in_kernel() { return current != nullptr; }

bool on_own_stack(const void* address) {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= current->stack && byte < current->stack + kStackBytes;
}

Moment now() { return {launches, blocks, barrier_epoch, warp().sync_epoch, thread_number()}; }

const LaunchConfig& running() { return *config; }

void fault(const char* format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fault_text = std::string(text) + " (kernel " + config->kernel + ", block " + std::to_string(blockIdx.x) +
                 ", thread " + std::to_string(thread_number()) + ")";
    stop(State::faulted, {"", 0});
    __builtin_unreachable();
}

void sync_block(Where where) { stop(State::at_barrier, where); }

const Slot* exchange(const void* deposit, size_t size, Where where) {
    if (fibers.size() % kWarpSize != 0)
        fault("warp-wide operation in a block with a partial warp (%s:%d)", where.file, where.line);
    // Two sets of slots in turn: a lane reaches the next operation but one only when all have read this one.
    Slot* const slots = warp().slots[warp().exchanges % 2];
    std::memcpy(slots[lane()].bytes, deposit, size);
    stop(State::at_warp, where);
    if (lane() == 0) ++warp().exchanges;
    return slots;
}

void sync_warp(Where where) {
    stop(State::at_warp, where);
    if (lane() == 0) warp().sync_epoch = ++epochs;
}

void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b, float (*decode)(uint16_t),
                        Where where) {
    struct Fragments {
        float a[4][2], b[2][2];
    };
    Fragments mine;
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) mine.a[i][half] = decode(static_cast<uint16_t>(a[i] >> 16 * half));
        for (int i = 0; i < 2; ++i) mine.b[i][half] = decode(static_cast<uint16_t>(b[i] >> 16 * half));
    }
    const Slot* const slots = exchange(&mine, sizeof mine, where);
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4, column = 2 * (lane() % 4) + i % 2;
        for (int k = 0; k < 16; ++k) {
            // k runs through the four lanes of a row in pairs, and through two registers in eights.
            const auto* left = reinterpret_cast<const Fragments*>(slots[4 * row + k % 8 / 2].bytes);
            const auto* right = reinterpret_cast<const Fragments*>(slots[4 * column + k % 8 / 2].bytes);
            sum[i] += left->a[i / 2 + 2 * (k / 8)][k % 2] * right->b[k / 8][k % 2];
        }
    }
}

void run_grid(const LaunchConfig& launch_config) {
    config = &launch_config;
    gridDim = config->grid;
    blockDim = config->block;
    if (gridDim.x == 0 || gridDim.y == 0 || gridDim.z == 0 || gridDim.y > 65535 || gridDim.z > 65535) {
        throw std::runtime_error(std::string("grid size out of range (kernel ") + config->kernel + ")");
    }
    make_fibers(config->block);
    ++launches;
    ++traffic.launches;
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block();
        }
    }
}

}  // namespace gvit::host
