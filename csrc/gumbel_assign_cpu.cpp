// CPU entry of gumbel_assign: one sample is the unit of work, so a result never depends on the thread count.
#include <torch/csrc/stable/ops.h>

#define GVIT_KERNELS "csrc/gumbel_assign_cpu_kernels.h"
#include "csrc/cpu_levels.h"

namespace gvit {
namespace {

// A thread is worth waking for about a million multiplications, some twenty microseconds.
index_t samples_per_thread(const AssignParams& p, index_t products) {
    const index_t moved = 16 * (p.groups + p.tokens) * p.channels;
    const index_t work = products * p.groups * (p.tokens * (p.channels + 64)) + moved;
    return larger<index_t>(1, (1 << 20) / (work + 1));
}

}  // namespace

void gumbel_assign_cpu(const AssignParams& p) {
    torch::stable::parallel_for(0, p.samples, samples_per_thread(p, p.hard ? 1 : 2),
                                [&](index_t first, index_t last) { GVIT_BEST(gumbel_assign)(p, first, last); });
}

void gumbel_assign_backward_cpu(const AssignParams& p) {
    torch::stable::parallel_for(0, p.samples, samples_per_thread(p, 4), [&](index_t first, index_t last) {
        GVIT_BEST(gumbel_assign_backward)(p, first, last);
    });
}

}  // namespace gvit
