// The table of CUDA kernels; the schemas are in library_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include "csrc/cuda_context.h"
#include "csrc/mask_upsample.h"

namespace {

using namespace gvit;

template <auto launch, class Params>
void on_cuda(const Params& params, const Tensor& tensor) {
    const CudaContext context(tensor);
    launch(params, context.stream());
    context.check_launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(groupvit_fast, CUDA, m) {
    m.impl("upsample_masks", TORCH_BOX((&upsample_masks<on_cuda<launch_upsample, UpsampleParams>>)));
    m.impl("upsample_masks_backward",
           TORCH_BOX((&upsample_masks_backward<on_cuda<launch_upsample_backward, UpsampleParams>>)));
    m.impl("decode_masks", TORCH_BOX((&decode_masks<on_cuda<launch_decode, DecodeParams>>)));
}
