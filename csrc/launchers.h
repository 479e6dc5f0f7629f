// The seam between torch and the kernels: one plain parameter struct and one launch function per kernel.
// No torch in here, so that the .cu files need none, and a test can launch them with plain memory.
#pragma once

#include "kernels/numeric.cuh"

using cudaStream_t = struct CUstream_st*;  // as the CUDA headers have it

namespace gvit {

// How a tensor's elements are stored; the launchers turn it into a template argument.
enum class Storage { float64, float32, bfloat16, float16 };

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

// input [planes, in_height, in_width] -> output [planes, out_height, out_width]; the backward reads the
// gradient of the output from `input` and writes the gradient of the input to `output`, sizes as named.
struct UpsampleParams {
    const void* input;
    void* output;
    index_t planes;
    index_t in_height, in_width;
    index_t out_height, out_width;
    Storage storage;
};

struct DecodeParams {
    const void* maps;           // [batch, groups, in_height, in_width]
    const void* scores;         // [batch, groups, classes], or null when group_labels is given
    const index_t* group_labels;  // [batch, groups], or null when scores is given
    const void* background_threshold;  // [batch], stored as the scores; null: no background class
    const index_t* target;      // [batch, out_height, out_width], or null
    index_t* labels;            // [batch, out_height, out_width]
    index_t* confusion;         // [num_classes, num_classes], zeroed by the caller; used with target
    index_t batch, groups, classes, num_classes;
    index_t in_height, in_width;
    index_t out_height, out_width;
    Storage storage;
    Storage score_storage;
};

// A batch of matrices with contiguous rows; strides in elements. Gradients and results are in the same form.
struct Matrices {
    void* data;
    index_t batch, head, row;  // head: group_attention only
};

// Shapes and formulas as in groupvit_fast/ops/reference.py. lse [samples, heads, groups], contiguous, is in
// the type of accumulation (float64 for float64, else float32).
struct AttentionParams {
    Matrices query, key, value, output;
    void* lse;
    Matrices grad_output, grad_query, grad_key, grad_value;  // backward only
    index_t samples, heads, groups, tokens, depth;
    double scale;
    Storage storage;
};

// bias and grad_bias [samples, groups], index [samples, tokens], count [samples, groups], lse [samples, tokens]
// are contiguous; count and lse are in the type of accumulation.
struct AssignParams {
    Matrices query, key, value, output;  // value.data is null where the values are the keys
    const void* bias;                    // or null
    const index_t* noise_key;            // [2]: key, offset; null: no noise
    index_t* index;
    void* count;
    void* lse;
    Matrices grad_output, grad_query, grad_key, grad_value;  // backward only; grad_value as value
    void* grad_bias;                                         // backward only; null where bias is
    index_t samples, groups, tokens, channels;
    double scale, tau, eps;
    bool hard;
    Storage storage;
};

void upsample_cpu(const UpsampleParams& params);
void upsample_backward_cpu(const UpsampleParams& params);
void decode_cpu(const DecodeParams& params);
void group_attention_cpu(const AttentionParams& params);
void group_attention_backward_cpu(const AttentionParams& params);
void gumbel_assign_cpu(const AssignParams& params);
void gumbel_assign_backward_cpu(const AssignParams& params);

void launch_upsample(const UpsampleParams& params, cudaStream_t stream);
void launch_upsample_backward(const UpsampleParams& params, cudaStream_t stream);
void launch_decode(const DecodeParams& params, cudaStream_t stream);
void launch_group_attention(const AttentionParams& params, cudaStream_t stream);
void launch_group_attention_backward(const AttentionParams& params, cudaStream_t stream);
void launch_gumbel_assign(const AssignParams& params, cudaStream_t stream);
void launch_gumbel_assign_backward(const AssignParams& params, cudaStream_t stream);

}  // namespace gvit
