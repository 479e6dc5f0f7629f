// The table of CUDA kernels; the schemas are in library_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <cstdlib>

#include "csrc/cuda_context.h"
#include "csrc/group_attention.h"
#include "csrc/gumbel_assign.h"
#include "csrc/mask_upsample.h"

namespace {

using namespace gvit;

template <auto launch, class Params>
void on_cuda(const Params& params, const Tensor& tensor) {
    const CudaContext context(tensor);
    launch(params, context.stream());
    context.check_launch();
}

// The tiled kernels count rows and columns of one sample, and the step between rows, in 31 bits.
void check_fits(const char* name, const Matrices& matrices, int64_t rows) {
    constexpr int64_t limit = int64_t{1} << 31;
    check(rows < limit && (rows <= 1 || std::abs(matrices.row) < limit), name,
          " is too large for the CUDA kernel: one sample may have 2^31 - 1 rows, that far apart");
}

template <class Params>
void check_tiled(const Params& params) {
    check(params.storage != Storage::float64, "query must be float32, bfloat16 or float16 on CUDA, got float64");
    check_fits("query", params.query, params.groups);
    check_fits("key", params.key, params.tokens);
    check_fits("value", params.value, params.tokens);
    check_fits("output", params.output, params.groups);
    check_fits("grad_output", params.grad_output, params.groups);
}

template <auto launch, class Params>
void tiled(const Params& params, const Tensor& tensor) {
    check_tiled(params);
    on_cuda<launch>(params, tensor);
}

// For a backward: with memory between its kernels.
template <auto launch, class Params>
void tiled_backward(Params params, const Tensor& tensor) {
    check_tiled(params);
    const Tensor workspace = torch::stable::new_empty(tensor, {workspace_floats(params)}, ScalarType::Float);
    params.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    on_cuda<launch>(params, tensor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(groupvit_fast, CUDA, m) {
    m.impl("upsample_masks", TORCH_BOX((&upsample_masks<on_cuda<launch_upsample, UpsampleParams>>)));
    m.impl("upsample_masks_backward",
           TORCH_BOX((&upsample_masks_backward<on_cuda<launch_upsample_backward, UpsampleParams>>)));
    m.impl("decode_masks", TORCH_BOX((&decode_masks<on_cuda<launch_decode, DecodeParams>>)));
    m.impl("group_attention_forward",
           TORCH_BOX((&group_attention_forward<tiled<launch_group_attention, AttentionParams>>)));
    m.impl("group_attention_backward",
           TORCH_BOX((&group_attention_backward<tiled_backward<launch_group_attention_backward, AttentionParams>>)));
    m.impl("gumbel_assign_forward", TORCH_BOX((&gumbel_assign_forward<tiled<launch_gumbel_assign, AssignParams>>)));
    m.impl("gumbel_assign_backward",
           TORCH_BOX((&gumbel_assign_backward<tiled_backward<launch_gumbel_assign_backward, AssignParams>>)));
}
