// The index of all operators: every schema, and the table of CPU kernels.
#include <torch/csrc/stable/library.h>

#include "csrc/group_attention.h"
#include "csrc/gumbel_assign.h"
#include "csrc/mask_upsample.h"

namespace {

using namespace gvit;

template <auto kernel, class Params>
void on_cpu(const Params& params, const Tensor&) {
    kernel(params);
}

}  // namespace

STABLE_TORCH_LIBRARY(groupvit_fast, m) {
    m.def(
        "group_attention_forward(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor output, Tensor lse)");
    m.def(
        "group_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, "
        "Tensor lse, float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
    m.def(
        "gumbel_assign_forward(Tensor query, Tensor key, Tensor? value, Tensor? bias, Tensor? noise_key, "
        "float scale, float tau, float eps, bool hard) -> (Tensor output, Tensor index, Tensor count, Tensor lse)");
    m.def(
        "gumbel_assign_backward(Tensor grad_output, Tensor? grad_count, Tensor query, Tensor key, Tensor? value, "
        "Tensor? bias, Tensor? noise_key, Tensor output, Tensor? index, Tensor count, Tensor? lse, float scale, "
        "float tau, float eps, bool hard) -> "
        "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)");
    m.def("upsample_masks(Tensor maps, SymInt height, SymInt width) -> Tensor");
    m.def("upsample_masks_backward(Tensor gradient, SymInt height, SymInt width) -> Tensor");
    m.def(
        "decode_masks(Tensor maps, Tensor scores, SymInt height, SymInt width, Tensor? background_threshold, "
        "Tensor? target, SymInt num_classes) -> (Tensor labels, Tensor confusion)");
}

STABLE_TORCH_LIBRARY_IMPL(groupvit_fast, CPU, m) {
    m.impl("group_attention_forward",
           TORCH_BOX((&group_attention_forward<on_cpu<group_attention_cpu, AttentionParams>>)));
    m.impl("group_attention_backward",
           TORCH_BOX((&group_attention_backward<on_cpu<group_attention_backward_cpu, AttentionParams>>)));
    m.impl("gumbel_assign_forward", TORCH_BOX((&gumbel_assign_forward<on_cpu<gumbel_assign_cpu, AssignParams>>)));
    m.impl("gumbel_assign_backward",
           TORCH_BOX((&gumbel_assign_backward<on_cpu<gumbel_assign_backward_cpu, AssignParams>>)));
    m.impl("upsample_masks", TORCH_BOX((&upsample_masks<on_cpu<upsample_cpu, UpsampleParams>>)));
    m.impl("upsample_masks_backward",
           TORCH_BOX((&upsample_masks_backward<on_cpu<upsample_backward_cpu, UpsampleParams>>)));
    m.impl("decode_masks", TORCH_BOX((&decode_masks<on_cpu<decode_cpu, DecodeParams>>)));
}
