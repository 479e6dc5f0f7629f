// The seam between torch and the kernels: one function per kernel and device, fed with a plain parameter
// struct. No torch in here, so that the .cu files need none, and a test can launch them with plain memory.
#pragma once

#include "kernels/parameters.cuh"

namespace gvit {

// Calls `call(T{})` with the element type that `storage` names.
template <class Call>
void with_storage_type(Storage storage, const Call& call) {
    switch (storage) {
        case Storage::float64: return call(double{});
        case Storage::float32: return call(float{});
        case Storage::bfloat16: return call(bfloat16{});
        case Storage::float16: return call(float16{});
    }
}

void upsample_cpu(const UpsampleParams& params);
void upsample_backward_cpu(const UpsampleParams& params);
void decode_cpu(const DecodeParams& params);
void group_attention_cpu(const AttentionParams& params);
void group_attention_backward_cpu(const AttentionParams& params);
void gumbel_assign_cpu(const AssignParams& params);
void gumbel_assign_backward_cpu(const AssignParams& params);

// What the CUDA backward kernels need in Params::workspace.
inline index_t workspace_floats(const AttentionParams& p) { return p.samples * p.heads * p.groups; }
inline index_t workspace_floats(const AssignParams& p) { return p.samples * (p.groups + p.tokens); }

void launch_upsample(const UpsampleParams& params, cudaStream_t stream);
void launch_upsample_backward(const UpsampleParams& params, cudaStream_t stream);
void launch_decode(const DecodeParams& params, cudaStream_t stream);
void launch_group_attention(const AttentionParams& params, cudaStream_t stream);
void launch_group_attention_backward(const AttentionParams& params, cudaStream_t stream);
void launch_gumbel_assign(const AssignParams& params, cudaStream_t stream);
void launch_gumbel_assign_backward(const AssignParams& params, cudaStream_t stream);

}  // namespace gvit
