// Launch of the gumbel_assign kernels.
#include "kernels/gumbel_assign_backward.cuh"

#include "csrc/launch_grid.h"

namespace gvit {
namespace {

// Chunks of the channels that a block sums at a time: registers allow no more, and 384 channels of 16 bits fit.
constexpr int kSumChunks = 6;

template <class T>
index_t slices(const AssignParams& p, int chunks) {
    return ceil_div<index_t>(p.channels, chunks * kTileColumns<T>);
}

template <class T>
void launch_average(const AssignParams& p, cudaStream_t stream) {
    const index_t items = p.samples * pair_tiles(p.groups) * slices<T>(p, kAverageChunks);
    GVIT_LAUNCH((average_kernel<T>), grid_blocks(items), dim3(kPairThreads), kAverageMemory<T> * sizeof(T), stream, p);
}

template <class T>
void launch_soft(const AssignParams& p, cudaStream_t stream) {
    const index_t items = p.samples * pair_tiles(p.groups) * slices<T>(p, kSumChunks);
    GVIT_LAUNCH((sum_over_tokens_kernel<T, AssignSoft, kSumChunks, AssignParams>), grid_blocks(items),
                dim3(kPairThreads), (kPairMemory<T, 1> * sizeof(T)), stream, p);
}

}  // namespace

void launch_gumbel_assign(const AssignParams& p, cudaStream_t stream) {
    with_float_type(p.storage, [&](auto type) {
        using T = decltype(type);
        if (p.tokens > 0) {
            GVIT_LAUNCH((assign_kernel<T>), grid_blocks(p.samples * pair_tiles(p.tokens)), dim3(kPairThreads),
                        (kPairMemory<T, 1, kAssignSlots> * sizeof(T)), stream, p);
        }
        if (p.hard) return launch_average<T>(p, stream);
        launch_soft<T>(p, stream);
    });
}

void launch_gumbel_assign_backward(const AssignParams& p, cudaStream_t stream) {
    with_float_type(p.storage, [&](auto type) {
        launch_gradients<decltype(type), AssignGradient, kSumChunks>(p, p.samples, 1, p.channels, stream);
    });
}

}  // namespace gvit
