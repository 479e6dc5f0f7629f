// From the arguments of gumbel_assign to its parameter struct, the same for every device;
// `run(params, tensor)` runs a kernel where the tensor lives. Schemas in csrc/library_cpu.cpp.
#pragma once

#include <tuple>

#include "csrc/huge_pages.h"
#include "csrc/tensor_checks.h"

namespace gvit {

// The CPU's backward has all logits of a token before it at once, and makes index and lse of them again.
inline bool keeps_lse(const Tensor& query) { return query.is_cuda(); }

struct AssignInputs {
    Tensor query, key;
    std::optional<Tensor> value, bias, noise_key;
};

// Checks all, makes rows contiguous where they are not, and fills what forward and backward share.
inline AssignParams assign_params(AssignInputs& in, double scale, double tau, double eps, bool hard) {
    check_shape("query", in.query, "[B, S, C]", {-1, -1, -1});
    const int64_t samples = in.query.size(0), groups = in.query.size(1), channels = in.query.size(2);
    check(groups > 0 && channels > 0, "query must have S, C >= 1, got ", shape_of(in.query));
    check_shape("key", in.key, "[B, L, C]", {samples, -1, channels});
    const int64_t tokens = in.key.size(1);
    if (in.value) check_shape("value", *in.value, "[B, L, C]", {samples, tokens, channels});
    if (in.bias) check_shape("bias", *in.bias, "[B, S]", {samples, groups});
    check_same_kind("key", in.key, "query", in.query);
    if (in.value) check_same_kind("value", *in.value, "query", in.query);
    if (in.bias) check_same_kind("bias", *in.bias, "query", in.query);
    if (in.noise_key) {
        check_shape("noise_key", *in.noise_key, "[2]", {2});
        check_dtype("noise_key", *in.noise_key, ScalarType::Long, "int64");
        check_same_device("noise_key", *in.noise_key, "query", in.query);
        in.noise_key = dense(*in.noise_key);
    }
    check(tau > 0, "tau must be above 0, got ", tau);
    in.query = dense_rows(in.query);
    in.key = dense_rows(in.key);
    if (in.value) in.value = dense_rows(*in.value);
    if (in.bias) in.bias = dense(*in.bias);

    AssignParams params{};
    params.query = matrices(in.query);
    params.key = matrices(in.key);
    if (in.value) params.value = matrices(*in.value);
    if (in.bias) params.bias = in.bias->const_data_ptr();
    if (in.noise_key) params.noise_key = in.noise_key->const_data_ptr<int64_t>();
    params.samples = samples;
    params.groups = groups;
    params.tokens = tokens;
    params.channels = channels;
    params.scale = scale;
    params.tau = tau;
    params.eps = eps;
    params.hard = hard;
    params.storage = storage_of("query", in.query);
    return params;
}

template <auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_assign_forward(const Tensor& query, const Tensor& key,
                                                                 const std::optional<Tensor>& value,
                                                                 const std::optional<Tensor>& bias,
                                                                 const std::optional<Tensor>& noise_key, double scale,
                                                                 double tau, double eps, bool hard) {
    AssignInputs in{query, key, value, bias, noise_key};
    AssignParams params = assign_params(in, scale, tau, eps, hard);
    const int32_t statistic =
        query.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    Tensor output = in_huge_pages(empty(query, {params.samples, params.groups, params.channels}));
    Tensor index = empty(query, {params.samples, params.tokens}, aoti_torch_dtype_int64());
    Tensor count = empty(query, {params.samples, params.groups}, statistic);
    Tensor lse =
        keeps_lse(query) ? empty(query, {params.samples, params.tokens}, statistic) : empty(query, {0}, statistic);
    params.output = matrices(output);
    params.index = index.mutable_data_ptr<int64_t>();
    params.count = count.mutable_data_ptr();
    if (keeps_lse(query)) params.lse = lse.mutable_data_ptr();
    if (params.samples > 0) run(params, query);
    return {output, index, count, lse};
}

template <auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_assign_backward(
    const Tensor& grad_output, const std::optional<Tensor>& grad_count, const Tensor& query, const Tensor& key,
    const std::optional<Tensor>& value, const std::optional<Tensor>& bias, const std::optional<Tensor>& noise_key,
    const Tensor& output, const std::optional<Tensor>& index, const Tensor& count, const std::optional<Tensor>& lse,
    double scale, double tau, double eps, bool hard) {
    AssignInputs in{query, key, value, bias, noise_key};
    AssignParams params = assign_params(in, scale, tau, eps, hard);
    const int64_t samples = params.samples, groups = params.groups, tokens = params.tokens;
    check_shape("grad_output", grad_output, "[B, S, C]", {samples, groups, params.channels});
    if (grad_count) check_shape("grad_count", *grad_count, "[B, S]", {samples, groups});
    check_shape("output", output, "[B, S, C]", {samples, groups, params.channels});
    check_shape("count", count, "[B, S]", {samples, groups});
    check_same_kind("grad_output", grad_output, "query", query);
    check_same_kind("output", output, "query", query);
    if (grad_count) {
        check_dtype("grad_count", *grad_count, statistic_type(query), "in the type of accumulation");
        check_same_device("grad_count", *grad_count, "query", query);
    }
    check_dtype("count", count, statistic_type(query), "in the type of accumulation");
    const Tensor gradient = dense_rows(grad_output), result = dense_rows(output), mass = dense(count);
    std::optional<Tensor> mass_gradient, winner, normaliser;
    if (grad_count) mass_gradient = dense(*grad_count);
    if (keeps_lse(query)) {
        check(index && lse, "index and lse must be those of the forward on CUDA, got none");
        check_shape("index", *index, "[B, L]", {samples, tokens});
        check_dtype("index", *index, ScalarType::Long, "int64");
        check_shape("lse", *lse, "[B, L]", {samples, tokens});
        check_dtype("lse", *lse, statistic_type(query), "in the type of accumulation");
        winner = dense(*index);
        normaliser = dense(*lse);
        params.index = const_cast<int64_t*>(winner->const_data_ptr<int64_t>());
        params.lse = const_cast<void*>(normaliser->const_data_ptr());
    }

    Tensor grad_query = in_huge_pages(empty(query, {samples, groups, params.channels}));
    Tensor grad_key = in_huge_pages(empty(query, {samples, tokens, params.channels}));
    Tensor grad_value = value ? in_huge_pages(empty(query, {samples, tokens, params.channels})) : empty(query, {0});
    Tensor grad_bias = bias ? empty(query, {samples, groups}) : empty(query, {0});
    params.output = matrices(result);
    params.count = const_cast<void*>(mass.const_data_ptr());
    params.grad_output = matrices(gradient);
    if (mass_gradient) params.grad_count = mass_gradient->const_data_ptr();
    params.grad_query = matrices(grad_query);
    params.grad_key = matrices(grad_key);
    if (value) params.grad_value = matrices(grad_value);
    if (bias) params.grad_bias = grad_bias.mutable_data_ptr();
    if (samples > 0) run(params, query);
    return {grad_query, grad_key, grad_value, grad_bias};
}

}  // namespace gvit
