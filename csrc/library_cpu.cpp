// The index of all operators: every schema, and the table of CPU kernels.
#include <torch/csrc/stable/library.h>

#include "csrc/mask_upsample.h"

namespace {

using namespace gvit;

template <auto kernel, class Params>
void on_cpu(const Params& params, const Tensor&) {
    kernel(params);
}

}  // namespace

STABLE_TORCH_LIBRARY(groupvit_fast, m) {
    m.def("upsample_masks(Tensor maps, SymInt height, SymInt width) -> Tensor");
    m.def("upsample_masks_backward(Tensor gradient, SymInt height, SymInt width) -> Tensor");
    m.def(
        "decode_masks(Tensor maps, Tensor scores, SymInt height, SymInt width, Tensor? background_threshold, "
        "Tensor? target, SymInt num_classes) -> (Tensor labels, Tensor confusion)");
}

STABLE_TORCH_LIBRARY_IMPL(groupvit_fast, CPU, m) {
    m.impl("upsample_masks", TORCH_BOX((&upsample_masks<on_cpu<upsample_cpu, UpsampleParams>>)));
    m.impl("upsample_masks_backward",
           TORCH_BOX((&upsample_masks_backward<on_cpu<upsample_backward_cpu, UpsampleParams>>)));
    m.impl("decode_masks", TORCH_BOX((&decode_masks<on_cpu<decode_cpu, DecodeParams>>)));
}
