// Every load and store of a kernel, checked.
//
// The kernels are compiled with -fsanitize=thread and linked without its runtime: the compiler calls the
// __tsan_* functions at the end of this file before each access, and they look the bytes up in a shadow
// memory. So kernels stay plain CUDA, with no accessor types. An access must lie on the thread's own stack,
// in shared memory the block asked for, in a tensor registered for the launch, or in the parameters.
#include <link.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>

#include "fibers.h"

namespace gvit::host {
namespace {

// The least that any target architecture gives a block (sm_86, sm_89, sm_120).
constexpr size_t kSharedLimit = 99 * 1024;
// Between two shared arrays, so that running off the end of one is seen.
constexpr size_t kGap = 256;
constexpr size_t kArenaBytes = 256 * 1024;
constexpr unsigned char kPoison = 0xFF;  // NaN as float32, bfloat16 and float16

int warp_of(const Moment& moment) { return moment.thread / kWarpSize; }

bool same_block(const Moment& a, const Moment& b) { return a.block == b.block; }

// Nothing orders the two: other blocks of the launch, or no barrier (or, in a warp, no sync) between.
bool unordered(const Moment& before, const Moment& after) {
    if (before.launch != after.launch) return false;
    if (!same_block(before, after)) return true;
    if (before.barrier != after.barrier || before.thread == after.thread) return false;
    return warp_of(before) != warp_of(after) || before.warp_sync == after.warp_sync;
}

// Accesses that do not exclude each other (reads, or atomic updates), as far as nothing has ordered them since.
struct Shared {
    Moment last;
    const void* code = nullptr;
    bool by_lanes = false;  // several lanes of one warp since its last sync
    bool by_warps = false;  // several warps since the last barrier

    void add(const Moment& moment, const void* where) {
        if (last.barrier != moment.barrier) {
            by_warps = by_lanes = false;
        } else if (warp_of(last) != warp_of(moment)) {
            by_warps = true;
        } else if (last.warp_sync != moment.warp_sync) {
            by_lanes = false;
        } else if (last.thread != moment.thread) {
            by_lanes = true;
        }
        last = moment;
        code = where;
    }

    bool unordered_with(const Moment& moment) const {
        if (last.launch != moment.launch) return false;
        if (!same_block(last, moment)) return true;
        if (last.barrier != moment.barrier) return false;
        if (by_warps || warp_of(last) != warp_of(moment)) return true;
        return last.warp_sync == moment.warp_sync && (by_lanes || last.thread != moment.thread);
    }
};

// What happened to one byte. Of shared memory, since its block began.
struct Cell {
    int64_t block = 0;
    Shared reads, atomics;
    Moment write;
    const void* write_code = nullptr;
    bool written = false;
    bool in_flight = false;  // an asynchronous copy has not been waited for
};

struct Region {
    unsigned char* start;
    size_t size;
    bool writable;
    const char* name;
    Cell* cells;
    bool per_block;
    bool contains(const void* address) const {
        const auto* byte = static_cast<const unsigned char*>(address);
        return byte >= start && byte < start + size;
    }
};

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int size, valid;
    const void* code;
};

struct StaticArray {
    Where where;
    void* address;
};

alignas(1024) unsigned char arena[kArenaBytes];
Cell arena_cells[kArenaBytes];
std::vector<Region> shared;      // of the running block
std::vector<Region> registered;  // tensors
std::vector<std::unique_ptr<Cell[]>> registered_cells;
std::vector<StaticArray> static_arrays;
std::vector<std::deque<std::vector<Copy>>> copies;  // by thread: committed groups, the open one last
size_t arena_used = 0, shared_used = 0;

void check_cell(const Region& region, size_t offset, Access access, const Moment& moment, const void* code) {
    Cell& cell = region.cells[offset];
    if (region.per_block && cell.block != moment.block) {
        cell = Cell{};
        cell.block = moment.block;
    }
    const char* const does = access == Access::read ? "read" : access == Access::write ? "written" : "updated";
    if (cell.in_flight) {
        fault("byte %zu of %s %s at [%p] before the wait for the asynchronous copy into it", offset, region.name, does,
              code);
    }
    if (access != Access::write && !cell.written) {
        fault("byte %zu of %s read at [%p] and never written", offset, region.name, code);
    }
    const auto race = [&](const char* did, const Moment& before, const void* before_code) {
        fault("race on byte %zu of %s: %s at [%p], %s by thread %d of %s block at [%p], with nothing to order them",
              offset, region.name, does, code, did, before.thread, same_block(before, moment) ? "the same" : "another",
              before_code);
    };
    if (unordered(cell.write, moment)) race("written", cell.write, cell.write_code);
    if (access != Access::atomic && cell.atomics.unordered_with(moment))
        race("updated", cell.atomics.last, cell.atomics.code);
    if (access != Access::read && cell.reads.unordered_with(moment)) race("read", cell.reads.last, cell.reads.code);
    if (access == Access::read) return cell.reads.add(moment, code);
    if (access == Access::atomic) return cell.atomics.add(moment, code);
    cell.write = moment;
    cell.write_code = code;
    cell.written = true;
}

const Region* find(const void* address) {
    for (const Region& region : shared) {
        if (region.contains(address)) return &region;
    }
    for (const Region& region : registered) {
        if (region.contains(address)) return &region;
    }
    return nullptr;
}

bool is_parameter(const void* address) {
    const auto* byte = static_cast<const unsigned char*>(address);
    const auto* start = static_cast<const unsigned char*>(running().parameters);
    return byte >= start && byte < start + running().parameter_bytes;
}

// The addresses of this library, constants and code.
std::pair<uintptr_t, uintptr_t> find_image() {
    std::pair<uintptr_t, uintptr_t> image{0, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
            uintptr_t first = ~uintptr_t{0}, last = 0;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
                const uintptr_t start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
                first = std::min(first, start);
                last = std::max(last, start + info->dlpi_phdr[i].p_memsz);
            }
            const auto here = reinterpret_cast<uintptr_t>(&arena);
            if (here < first || here >= last) return 0;
            *static_cast<std::pair<uintptr_t, uintptr_t>*>(result) = {first, last};
            return 1;
        },
        &image);
    return image;
}

// A kernel may read its program (constants, threadIdx) but never write to it.
bool in_program(const void* address) {
    static const auto image = find_image();
    const auto value = reinterpret_cast<uintptr_t>(address);
    const bool in_arena = address >= arena && address < arena + kArenaBytes;
    return value >= image.first && value < image.second && !in_arena;
}

void add_shared(size_t size, const char* name) {
    unsigned char* const start = arena + arena_used;
    shared.push_back({start, size, true, name, arena_cells + arena_used, true});
    std::fill(start, start + size, kPoison);
    arena_used += (size + 2 * kGap - 1) / kGap * kGap;
    shared_used += size;
}

void deliver(const Copy& copy) {
    const Region* region = find(copy.to);
    for (int i = 0; i < copy.size; ++i) region->cells[copy.to + i - region->start].in_flight = false;
    check_access(copy.to, copy.size, Access::write, copy.code);
    std::copy(copy.from, copy.from + copy.valid, copy.to);
    std::fill(copy.to + copy.valid, copy.to + copy.size, 0);
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kWatched = false;  // no hooks in that build, so the shadow memory knows too little
#else
constexpr bool kWatched = true;
#endif

Traffic traffic;

void check_access(const void* address, size_t size, Access access, const void* code) {
    if (!kWatched || !in_kernel() || on_own_stack(address)) return;
    const Region* region = find(address);
    if (region == nullptr) {
        if (access == Access::read && (is_parameter(address) || in_program(address))) return;
        fault("%s at [%p] outside every tensor and shared array: %zu bytes at %p",
              access == Access::read ? "read" : "write", code, size, address);
    }
    const size_t offset = static_cast<const unsigned char*>(address) - region->start;
    if (offset + size > region->size) {
        fault("%zu bytes at [%p] run past the end of %s", size, code, region->name);
    }
    if (access != Access::read && !region->writable) fault("%s written at [%p]: it is an input", region->name, code);
    if (!region->per_block && access != Access::write) traffic.read += size;
    if (!region->per_block && access != Access::read) traffic.written += size;
    const Moment moment = now();
    for (size_t i = 0; i < size; ++i) check_cell(*region, offset + i, access, moment, code);
}

void begin_block(size_t shared_bytes) {
    shared.clear();
    static_arrays.clear();
    copies.clear();
    copies.resize(blockDim.x * blockDim.y * blockDim.z);
    for (auto& groups : copies) groups.emplace_back();
    arena_used = kGap;
    shared_used = 0;
    if (shared_bytes > 0) add_shared(shared_bytes, "dynamic shared memory");
}

void end_block() {
    if (shared_used > kSharedLimit) {
        throw std::runtime_error(std::to_string(shared_used) +
                                 " bytes of shared memory: not every target has them (kernel " + running().kernel +
                                 ")");
    }
    for (const auto& groups : copies) {
        const bool waited = std::all_of(groups.begin(), groups.end(), [](const auto& group) { return group.empty(); });
        if (!waited) {
            throw std::runtime_error(std::string("a block ended with asynchronous copies in flight (kernel ") +
                                     running().kernel + ")");
        }
    }
}

unsigned char* dynamic_shared() { return arena + kGap; }

void* static_shared(size_t size, Where where) {
    for (const StaticArray& array : static_arrays) {
        if (array.where.line == where.line && array.where.file == where.file) return array.address;
    }
    if (arena_used + size + 2 * kGap > kArenaBytes) fault("%zu more bytes of shared memory than any GPU has", size);
    static_arrays.push_back({where, arena + arena_used});
    add_shared(size, "a shared array");
    return static_arrays.back().address;
}

void async_copy(void* shared_address, const void* global, int size, int valid) {
    const void* code = __builtin_return_address(0);
    auto* const to = static_cast<unsigned char*>(shared_address);
    const bool aligned = reinterpret_cast<uintptr_t>(to) % size == 0 && reinterpret_cast<uintptr_t>(global) % size == 0;
    if (!aligned) fault("asynchronous copy of %d bytes at [%p] from or to an unaligned address", size, code);
    if (valid > 0) check_access(global, valid, Access::read, code);
    check_access(to, size, Access::write, code);
    const Region* region = find(to);
    for (int i = 0; i < size; ++i) region->cells[to + i - region->start].in_flight = true;
    copies[now().thread].back().push_back({to, static_cast<const unsigned char*>(global), size, valid, code});
}

void async_commit() { copies[now().thread].emplace_back(); }

void async_wait(int groups_left) {
    auto& groups = copies[now().thread];
    // The last group is still open and belongs to no wait.
    while (static_cast<int>(groups.size()) - 1 > groups_left) {
        for (const Copy& copy : groups.front()) deliver(copy);
        groups.pop_front();
    }
}

}  // namespace gvit::host

// The interface for Python (library.py): which tensors a launch may touch, and what [addresses] are relative to.
GVIT_EXPORT uintptr_t gvit_host_image() { return gvit::host::find_image().first; }
GVIT_EXPORT void gvit_host_traffic(gvit::host::Traffic* result) {
    *result = gvit::host::traffic;
    gvit::host::traffic = {};
}
GVIT_EXPORT void gvit_host_forget_tensors() {
    gvit::host::registered.clear();
    gvit::host::registered_cells.clear();
}

GVIT_EXPORT void gvit_host_register_tensor(void* start, size_t size, int writable, int written, const char* name) {
    using namespace gvit::host;
    registered_cells.push_back(std::make_unique<Cell[]>(size));
    Cell* const cells = registered_cells.back().get();
    for (size_t i = 0; i < size; ++i) cells[i].written = written != 0;
    registered.push_back({static_cast<unsigned char*>(start), size, writable != 0, name, cells, false});
}

#define GVIT_HOOK(size)                                                                                  \
    extern "C" void __tsan_read##size(void* address) {                                                   \
        gvit::host::check_access(address, size, gvit::host::Access::read, __builtin_return_address(0));  \
    }                                                                                                    \
    extern "C" void __tsan_write##size(void* address) {                                                  \
        gvit::host::check_access(address, size, gvit::host::Access::write, __builtin_return_address(0)); \
    }                                                                                                    \
    extern "C" void __tsan_unaligned_read##size(void* address) {                                         \
        gvit::host::check_access(address, size, gvit::host::Access::read, __builtin_return_address(0));  \
    }                                                                                                    \
    extern "C" void __tsan_unaligned_write##size(void* address) {                                        \
        gvit::host::check_access(address, size, gvit::host::Access::write, __builtin_return_address(0)); \
    }
GVIT_HOOK(1)
GVIT_HOOK(2)
GVIT_HOOK(4)
GVIT_HOOK(8)
GVIT_HOOK(16)

extern "C" void __tsan_read_range(void* address, size_t size) {
    gvit::host::check_access(address, size, gvit::host::Access::read, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t size) {
    gvit::host::check_access(address, size, gvit::host::Access::write, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
