// One plain parameter struct per kernel, and the same for its gradient: what csrc/ fills in and a kernel reads.
#pragma once

#include "numeric.cuh"

namespace gvit {

// input [planes, in_height, in_width] -> output [planes, out_height, out_width]. The backward reads the
// gradient of that output from `input` and writes the gradient of that input to `output`.
struct UpsampleParams {
    const void* input;
    void* output;
    index_t planes;
    index_t in_height, in_width;
    index_t out_height, out_width;
    Storage storage;
};

struct DecodeParams {
    const void* maps;                  // [batch, groups, in_height, in_width]
    const void* scores;                // [batch, groups, classes]; null when group_labels is given
    const index_t* group_labels;       // [batch, groups]; null when scores is given
    const void* background_threshold;  // [batch], stored as the scores; null: no background class
    const index_t* target;             // [batch, out_height, out_width], or null
    index_t* labels;                   // [batch, out_height, out_width]
    index_t* confusion;                // [num_classes, num_classes], zeroed by the caller; with target
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
    float* workspace;                                        // CUDA backward only: workspace_floats(params)
    index_t samples, heads, groups, tokens, depth;
    double scale;
    Storage storage;
};

// bias and grad_bias [samples, groups], index [samples, tokens], count [samples, groups], lse [samples, tokens]
// are contiguous; count and lse are in the type of accumulation. On the CPU there is no lse, and no index in the
// backward.
struct AssignParams {
    Matrices query, key, value, output;  // value.data is null where the values are the keys
    const void* bias;                    // or null
    const index_t* noise_key;            // [2]: key, offset; null: no noise
    index_t* index;
    void* count;
    void* lse;
    Matrices grad_output, grad_query, grad_key, grad_value;  // backward only; grad_value as value
    const void* grad_count;                                  // backward only, as count; null: no such gradient
    void* grad_bias;                                         // backward only; null where bias is
    float* workspace;                                        // CUDA backward only: workspace_floats(params)
    index_t samples, groups, tokens, channels;
    double scale, tau, eps;
    bool hard;
    Storage storage;
};

}  // namespace gvit
