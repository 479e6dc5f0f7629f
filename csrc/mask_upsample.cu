// Launch of the mask_upsample kernels.
#include "kernels/mask_upsample.cuh"

#include "csrc/launchers.h"

namespace gvit {
namespace {

constexpr index_t kMaxGridX = 2147483647;
constexpr index_t kMaxGridY = 65535;
constexpr index_t kPlanesPerThread = 8;  // amortises the taps of a pixel
constexpr index_t kPixelsPerThread = 8;  // amortises a block's table of group labels
constexpr size_t kSharedWithoutAsking = 48 * 1024;

unsigned grid_x(index_t blocks) { return static_cast<unsigned>(smaller(blocks, kMaxGridX)); }
unsigned grid_y(index_t blocks) { return static_cast<unsigned>(smaller(blocks, kMaxGridY)); }

}  // namespace

void launch_upsample(const UpsampleParams& p, cudaStream_t stream) {
    const dim3 grid(grid_x(ceil_div<index_t>(p.out_height * p.out_width, kUpsampleThreads)),
                    grid_y(ceil_div(p.planes, kPlanesPerThread)));
    with_storage_type(p.storage, [&](auto type) {
        using T = decltype(type);
        GVIT_LAUNCH((upsample_kernel<T>), grid, dim3(kUpsampleThreads), 0, stream, p);
    });
}

void launch_upsample_backward(const UpsampleParams& p, cudaStream_t stream) {
    const index_t tiles = ceil_div<index_t>(p.in_width, kBackwardThreads);
    const dim3 grid(grid_x(p.planes * p.in_height * tiles));
    with_storage_type(p.storage, [&](auto type) {
        using T = decltype(type);
        GVIT_LAUNCH((upsample_backward_kernel<T>), grid, dim3(kBackwardThreads), 0, stream, p);
    });
}

void launch_decode(const DecodeParams& p, cudaStream_t stream) {
    const index_t pixels = p.out_height * p.out_width;
    const dim3 grid(grid_x(ceil_div<index_t>(pixels, kDecodeThreads * kPixelsPerThread)), grid_y(p.batch));
    const size_t labels_bytes = p.groups * sizeof(index_t);
    const size_t counts_bytes = p.num_classes * p.num_classes * sizeof(unsigned);
    const bool counts_in_shared = p.target != nullptr && labels_bytes + counts_bytes <= kSharedWithoutAsking;
    const size_t shared_bytes = labels_bytes + (counts_in_shared ? counts_bytes : 0);
    with_storage_type(p.storage, [&](auto type) {
        using T = decltype(type);
        GVIT_LAUNCH((decode_kernel<T>), grid, dim3(kDecodeThreads), shared_bytes, stream, p, counts_in_shared);
    });
}

}  // namespace gvit
