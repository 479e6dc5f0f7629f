// What the launch code of the tiled kernels shares.
#pragma once

#include <stdexcept>

#include "csrc/launchers.h"
#include "kernels/token_group.cuh"

namespace gvit {

// One block per work item, as far as a grid goes; the kernels go round for the rest.
inline unsigned grid_blocks(index_t items) { return static_cast<unsigned>(smaller<index_t>(items, kMaxBlocks)); }

// As with_storage_type, for kernels that have no float64.
template <class Call>
void with_float_type(Storage storage, const Call& call) {
    switch (storage) {
        case Storage::float32: return call(float{});
        case Storage::bfloat16: return call(bfloat16{});
        case Storage::float16: return call(float16{});
        case Storage::float64: throw std::invalid_argument("no float64 kernel");  // refused in library_cuda.cpp
    }
}

inline index_t pair_tiles(index_t rows) { return ceil_div<index_t>(rows, kPairTile); }

// The gradients of both operators (token_group.cuh): the row products D, then the two sums.
template <class T, template <class> class Operator, int kChunks, class Params>
void launch_gradients(const Params& p, index_t problems, index_t heads, index_t channels, cudaStream_t stream) {
    GVIT_LAUNCH((row_dot_kernel<T>), grid_blocks(ceil_div<index_t>(problems * p.groups, kRowDotThreads / kWarpSize)),
                dim3(kRowDotThreads), 0, stream, p.grad_output, p.output, problems, static_cast<int>(heads),
                static_cast<int>(p.groups), static_cast<int>(channels), p.workspace);
    const size_t shared_bytes = kPairMemory<T, 2> * sizeof(T);
    const unsigned token_blocks = grid_blocks(problems * pair_tiles(p.tokens));
    if (p.tokens > 0 && p.groups <= kPairTile) {
        GVIT_LAUNCH((sum_over_groups_kernel<T, Operator, true, Params>), token_blocks, dim3(kPairThreads), shared_bytes,
                    stream, p);
    } else if (p.tokens > 0) {
        GVIT_LAUNCH((sum_over_groups_kernel<T, Operator, false, Params>), token_blocks, dim3(kPairThreads),
                    shared_bytes, stream, p);
    }
    const index_t slices = ceil_div<index_t>(channels, kChunks * kTileColumns<T>);
    GVIT_LAUNCH((sum_over_tokens_kernel<T, Operator, kChunks, Params>),
                grid_blocks(problems * pair_tiles(p.groups) * slices), dim3(kPairThreads), shared_bytes, stream, p);
}

}  // namespace gvit
