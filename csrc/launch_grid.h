// What the launch code of the tiled kernels shares.
#pragma once

#include <stdexcept>

#include "csrc/launchers.h"

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
        case Storage::float64: throw std::invalid_argument("this kernel has no float64");
    }
}

}  // namespace gvit
