// The CPU kernels of gumbel_assign for a range of samples, one set per level; see csrc/cpu_levels.h.
#include "csrc/gumbel_assign_cpu_tile.h"

#include "csrc/gumbel_assign_cpu_backward.h"
#include "csrc/gumbel_assign_cpu_forward.h"

namespace gvit::GVIT_LEVEL {

template <template <class> class Kernel>
void assign_samples(const AssignParams& p, index_t first, index_t last) {
    with_storage_type(p.storage, [&](auto type) {
        Kernel<decltype(type)> kernel(p);
        for (index_t sample = first; sample < last; ++sample) kernel.run(sample);
    });
}

inline void gumbel_assign(const AssignParams& p, index_t first, index_t last) {
    assign_samples<AssignForward>(p, first, last);
}

inline void gumbel_assign_backward(const AssignParams& p, index_t first, index_t last) {
    assign_samples<AssignBackward>(p, first, last);
}

}  // namespace gvit::GVIT_LEVEL
