// The CPU kernels of gumbel_assign for a range of samples, one set per level; see csrc/cpu_levels.h.
#include "csrc/gumbel_assign_cpu_tile.h"

#include "csrc/gumbel_assign_cpu_backward.h"
#include "csrc/gumbel_assign_cpu_forward.h"
#if GVIT_BFLOAT_PRODUCTS
#include "csrc/gumbel_assign_cpu_filter.h"
#endif

namespace gvit::GVIT_LEVEL {

template <template <class> class Kernel, class S>
void assign_samples(const AssignParams& p, index_t first, index_t last) {
    Kernel<S> kernel(p);
    for (index_t sample = first; sample < last; ++sample) kernel.run(sample);
}

template <template <class> class Kernel>
void assign_samples(const AssignParams& p, index_t first, index_t last) {
    with_storage_type(p.storage, [&](auto type) { assign_samples<Kernel, decltype(type)>(p, first, last); });
}

inline void gumbel_assign(const AssignParams& p, index_t first, index_t last) {
#if GVIT_BFLOAT_PRODUCTS
    if (AssignFilter<float>::serves(p)) {
        if (p.storage == Storage::bfloat16) return assign_samples<AssignFilter, bfloat16>(p, first, last);
        return assign_samples<AssignFilter, float>(p, first, last);
    }
#endif
    assign_samples<AssignForward>(p, first, last);
}

inline void gumbel_assign_backward(const AssignParams& p, index_t first, index_t last) {
    assign_samples<AssignBackward>(p, first, last);
}

}  // namespace gvit::GVIT_LEVEL
