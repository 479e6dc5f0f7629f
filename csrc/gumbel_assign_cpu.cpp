// CPU entry of gumbel_assign: one sample is the unit of work, so a result never depends on the thread count.
#include <torch/csrc/stable/ops.h>

#define GVIT_KERNELS "csrc/gumbel_assign_cpu_kernels.h"
#define GVIT_BFLOAT_LEVEL
#include "csrc/cpu_levels.h"

namespace gvit {
namespace {

// A thread is worth waking for about a million multiplications, some twenty microseconds.
index_t samples_per_thread(const AssignParams& p, index_t products) {
    const index_t moved = 16 * (p.groups + p.tokens) * p.channels;
    const index_t work = products * p.groups * (p.tokens * (p.channels + 64)) + moved;
    return larger<index_t>(1, (1 << 20) / (work + 1));
}

// One level for both: the backward chooses again, and must choose alike.
#if GVIT_X86_LEVELS
#define GVIT_ASSIGN(function) (has_bfloat_products() ? &avx512_bfloat::function : GVIT_BEST(function))
#else
#define GVIT_ASSIGN(function) GVIT_BEST(function)
#endif

}  // namespace

void gumbel_assign_cpu(const AssignParams& p) {
    const auto kernel = GVIT_ASSIGN(gumbel_assign);
    torch::stable::parallel_for(0, p.samples, samples_per_thread(p, p.hard ? 1 : 2),
                                [&](index_t first, index_t last) { kernel(p, first, last); });
}

void gumbel_assign_backward_cpu(const AssignParams& p) {
    const auto kernel = GVIT_ASSIGN(gumbel_assign_backward);
    torch::stable::parallel_for(0, p.samples, samples_per_thread(p, 4),
                                [&](index_t first, index_t last) { kernel(p, first, last); });
}

}  // namespace gvit
