// CPU entry of group_attention: one head, or one tile of its groups, is the unit of work, so a result never
// depends on the thread count.
#include <torch/csrc/stable/ops.h>

#define GVIT_KERNELS "csrc/group_attention_cpu_kernels.h"
#define GVIT_BFLOAT_LEVEL
#include "csrc/cpu_levels.h"

namespace gvit {

namespace {

// A thread is worth waking for about a million multiplications, some twenty microseconds; `products` of groups
// with tokens a head, beside which it reads and writes rows, and begins.
index_t heads_per_thread(const AttentionParams& p, index_t groups, index_t products) {
    const index_t rows = 4 * (groups + p.tokens);
    return (1 << 20) / (products * groups * p.tokens * p.depth + rows * p.depth + (1 << 13)) + 1;
}

using Kernel = void (*)(const AttentionParams&, index_t, index_t);

Kernel forward_kernel(const AttentionParams& p) {
#if GVIT_X86_LEVELS
    if (p.storage == Storage::bfloat16 && has_bfloat_products()) return &avx512_bfloat::group_attention;
#endif
    return GVIT_BEST(group_attention);
}

Kernel backward_kernel(const AttentionParams& p) {
#if GVIT_X86_LEVELS
    if (p.storage == Storage::bfloat16 && has_bfloat_products()) return &avx512_bfloat::group_attention_backward;
#endif
    return GVIT_BEST(group_attention_backward);
}

}  // namespace

void group_attention_cpu(const AttentionParams& p) {
    const Kernel kernel = forward_kernel(p);
    const index_t tiles = ceil_div(p.groups, plain::kGroupTile);
    const index_t grain = heads_per_thread(p, smaller(p.groups, plain::kGroupTile), 2);
    torch::stable::parallel_for(0, p.samples * p.heads * tiles, grain,
                                [&](index_t first, index_t last) { kernel(p, first, last); });
}

void group_attention_backward_cpu(const AttentionParams& p) {
    const Kernel kernel = backward_kernel(p);
    torch::stable::parallel_for(0, p.samples * p.heads, heads_per_thread(p, p.groups, 5),
                                [&](index_t first, index_t last) { kernel(p, first, last); });
}

}  // namespace gvit
