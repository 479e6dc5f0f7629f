// CPU entry of gumbel_assign: one sample is the unit of work, so a result never depends on the thread count.
#include <torch/csrc/stable/ops.h>

#define GVIT_KERNELS "csrc/gumbel_assign_cpu_kernels.h"
#include "csrc/cpu_levels.h"

namespace gvit {

void gumbel_assign_cpu(const AssignParams& p) {
    torch::stable::parallel_for(0, p.samples, 1,
                                [&](index_t first, index_t last) { GVIT_BEST(gumbel_assign)(p, first, last); });
}

void gumbel_assign_backward_cpu(const AssignParams& p) {
    torch::stable::parallel_for(
        0, p.samples, 1, [&](index_t first, index_t last) { GVIT_BEST(gumbel_assign_backward)(p, first, last); });
}

}  // namespace gvit
