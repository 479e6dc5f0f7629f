// From the arguments of group_attention to its parameter struct, the same for every device;
// `run(params, tensor)` runs a kernel where the tensor lives. Schemas in csrc/library_cpu.cpp.
#pragma once

#include <tuple>

#include "csrc/huge_pages.h"
#include "csrc/tensor_checks.h"

namespace gvit {

// Memory order [B, rows, H, D], seen as [B, H, rows, D]: what merges the heads afterwards is then a view.
inline Tensor empty_heads(const Tensor& like, int64_t samples, int64_t heads, int64_t rows, int64_t depth) {
    const int64_t row = larger<int64_t>(heads, 1) * depth;
    return in_huge_pages(
        empty_strided(like, {samples, heads, rows, depth}, {larger<int64_t>(rows, 1) * row, depth, row, 1}));
}

struct AttentionInputs {
    Tensor query, key, value;
};

inline AttentionParams attention_params(AttentionInputs& in, double scale) {
    check_shape("query", in.query, "[B, H, S, D]", {-1, -1, -1, -1});
    const int64_t samples = in.query.size(0), heads = in.query.size(1), depth = in.query.size(3);
    check(depth > 0, "query must have D >= 1, got ", shape_of(in.query));
    check_shape("key", in.key, "[B, H, L, D]", {samples, heads, -1, depth});
    check_shape("value", in.value, "[B, H, L, D]", {samples, heads, in.key.size(2), depth});
    check_same_kind("key", in.key, "query", in.query);
    check_same_kind("value", in.value, "query", in.query);
    in = {dense_rows(in.query), dense_rows(in.key), dense_rows(in.value)};

    AttentionParams params{};
    params.query = matrices(in.query);
    params.key = matrices(in.key);
    params.value = matrices(in.value);
    params.samples = samples;
    params.heads = heads;
    params.groups = in.query.size(2);
    params.tokens = in.key.size(2);
    params.depth = depth;
    params.scale = scale;
    params.storage = storage_of("query", in.query);
    return params;
}

template <auto run>
std::tuple<Tensor, Tensor> group_attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                   double scale) {
    AttentionInputs in{query, key, value};
    AttentionParams params = attention_params(in, scale);
    Tensor output = empty_heads(query, params.samples, params.heads, params.groups, params.depth);
    Tensor lse = torch::stable::new_empty(query, {params.samples, params.heads, params.groups}, statistic_type(query));
    params.output = matrices(output);
    params.lse = lse.mutable_data_ptr();
    if (output.numel() > 0) run(params, query);
    return {output, lse};
}

template <auto run>
std::tuple<Tensor, Tensor, Tensor> group_attention_backward(const Tensor& grad_output, const Tensor& query,
                                                            const Tensor& key, const Tensor& value,
                                                            const Tensor& output, const Tensor& lse, double scale) {
    AttentionInputs in{query, key, value};
    AttentionParams params = attention_params(in, scale);
    const int64_t samples = params.samples, heads = params.heads, groups = params.groups, depth = params.depth;
    check_shape("grad_output", grad_output, "[B, H, S, D]", {samples, heads, groups, depth});
    check_shape("output", output, "[B, H, S, D]", {samples, heads, groups, depth});
    check_shape("lse", lse, "[B, H, S]", {samples, heads, groups});
    check_same_kind("grad_output", grad_output, "query", query);
    check_same_kind("output", output, "query", query);
    check_dtype("lse", lse, statistic_type(query), "in the type of accumulation");
    const Tensor gradient = dense_rows(grad_output), result = dense_rows(output), normaliser = dense(lse);

    Tensor grad_query = empty_heads(query, samples, heads, groups, depth);
    Tensor grad_key = empty_heads(query, samples, heads, params.tokens, depth);
    Tensor grad_value = empty_heads(query, samples, heads, params.tokens, depth);
    if (groups == 0) {
        torch::stable::zero_(grad_key);
        torch::stable::zero_(grad_value);
        return {grad_query, grad_key, grad_value};
    }
    params.output = matrices(result);
    params.lse = const_cast<void*>(normaliser.const_data_ptr());
    params.grad_output = matrices(gradient);
    params.grad_query = matrices(grad_query);
    params.grad_key = matrices(grad_key);
    params.grad_value = matrices(grad_value);
    if (samples * heads > 0) run(params, query);
    return {grad_query, grad_key, grad_value};
}

}  // namespace gvit
