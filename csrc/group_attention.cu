// Launch of the group_attention kernels.
#include "kernels/group_attention.cuh"

#include "csrc/launch_grid.h"

namespace gvit {
namespace {

template <class T, int kWarps, bool kResident>
void launch_attend(const AttentionParams& p, cudaStream_t stream) {
    const index_t items = attend_items(p, 16 * kWarps);
    GVIT_LAUNCH((attend_kernel<T, kWarps, kResident>), grid_blocks(items), dim3(kWarps * kWarpSize),
                (attend_shared_bytes<T, kWarps, kResident>(p.depth)), stream, p);
}

}  // namespace

void launch_group_attention(const AttentionParams& p, cudaStream_t stream) {
    with_float_type(p.storage, [&](auto type) {
        using T = decltype(type);
        if (p.depth > kAttendResident * kTileColumns<T>) return launch_attend<T, 4, false>(p, stream);
        // One warp is enough for the 16 groups that it holds.
        if (p.groups <= 16) return launch_attend<T, 1, true>(p, stream);
        launch_attend<T, 4, true>(p, stream);
    });
}

void launch_group_attention_backward(const AttentionParams& p, cudaStream_t stream) {
    with_float_type(p.storage, [&](auto type) {
        using T = decltype(type);
        constexpr int chunks = 64 / kTileColumns<T>;  // the head dim of the presets
        launch_gradients<T, AttentionGradient, chunks>(p, p.samples * p.heads, p.heads, p.depth, stream);
    });
}

}  // namespace gvit
