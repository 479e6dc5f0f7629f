// CPU entry of group_attention: one head, or one tile of its groups, is the unit of work, so a result never
// depends on the thread count.
#include <torch/csrc/stable/ops.h>

#define GVIT_KERNELS "csrc/group_attention_cpu_kernels.h"
#include "csrc/cpu_levels.h"

namespace gvit {

void group_attention_cpu(const AttentionParams& p) {
    const index_t units = p.samples * p.heads * ceil_div(p.groups, plain::kGroupTile);
    const index_t grain = larger<index_t>(1, 16384 / (p.tokens * smaller(p.groups, plain::kGroupTile) + 1));
    torch::stable::parallel_for(0, units, grain,
                                [&](index_t first, index_t last) { GVIT_BEST(group_attention)(p, first, last); });
}

void group_attention_backward_cpu(const AttentionParams& p) {
    const index_t grain = larger<index_t>(1, 8192 / (p.tokens * p.groups + 1));
    torch::stable::parallel_for(0, p.samples * p.heads, grain, [&](index_t first, index_t last) {
        GVIT_BEST(group_attention_backward)(p, first, last);
    });
}

}  // namespace gvit
