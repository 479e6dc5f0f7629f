// From the arguments of upsample_masks and decode_masks to their parameter structs, the same for every
// device; `run(params, tensor)` runs a kernel where the tensor lives.
#pragma once

#include <tuple>

#include "csrc/tensor_checks.h"

namespace gvit {

constexpr int64_t kMaxPlane = 2147483647;  // elements; the batch may be larger

inline void check_size(int64_t height, int64_t width) {
    check(height > 0 && width > 0, "size must be two positive numbers, got (", height, ", ", width, ")");
    check(width <= kMaxPlane / height, "size must be below 2^31 pixels, got (", height, ", ", width, ")");
}

inline void check_maps(const char* name, const Tensor& maps) {
    check_shape(name, maps, "[B, G, h, w]", {-1, -1, -1, -1});
    check(maps.size(2) > 0 && maps.size(3) > 0, name, " must have h, w >= 1, got ", shape_of(maps));
    check(maps.size(3) <= kMaxPlane / maps.size(2), name, " must have h * w < 2^31, got ", shape_of(maps));
}

template <auto run>
Tensor upsample_masks(const Tensor& maps, int64_t height, int64_t width) {
    check_maps("maps", maps);
    check_size(height, width);
    const Storage storage = storage_of("maps", maps);
    Tensor output = torch::stable::new_empty(maps, {maps.size(0), maps.size(1), height, width});
    if (output.numel() == 0) return output;
    const Tensor input = dense(maps);
    UpsampleParams params{input.const_data_ptr(),
                          output.mutable_data_ptr(),
                          maps.size(0) * maps.size(1),
                          maps.size(2),
                          maps.size(3),
                          height,
                          width,
                          storage};
    run(params, maps);
    return output;
}

// gradient [B, G, H, W] of the output -> gradient [B, G, height, width] of the maps.
template <auto run>
Tensor upsample_masks_backward(const Tensor& gradient, int64_t height, int64_t width) {
    check_maps("gradient", gradient);
    check_size(height, width);
    const Storage storage = storage_of("gradient", gradient);
    const int64_t batch = gradient.size(0), groups = gradient.size(1);
    Tensor output = torch::stable::new_empty(gradient, {batch, groups, height, width});
    if (output.numel() == 0) return output;
    const Tensor input = dense(gradient);
    UpsampleParams params{input.const_data_ptr(), output.mutable_data_ptr(), batch * groups, height, width,
                          gradient.size(2),       gradient.size(3),          storage};
    run(params, gradient);
    return output;
}

// scores [B, G, K] floating, or [B, G] int64 when each group's label is known already.
inline void check_scores(const Tensor& maps, const Tensor& scores, const std::optional<Tensor>& threshold) {
    const int64_t batch = maps.size(0), groups = maps.size(1);
    if (scores.dim() == 2) {
        check_shape("labels", scores, "[B, G]", {batch, groups});
        check_dtype("labels", scores, ScalarType::Long, "int64");
        check(!threshold, "background_threshold needs scores [B, G, K], got labels [B, G]");
    } else {
        check_shape("scores", scores, "[B, G, K]", {batch, groups, -1});
        check(scores.size(2) > 0 && scores.size(2) <= kMaxPlane, "scores must have K >= 1, got ", shape_of(scores));
    }
    check_same_device("scores", scores, "maps", maps);
    if (!threshold) return;
    check_shape("background_threshold", *threshold, "[B]", {batch});
    check(threshold->scalar_type() == scores.scalar_type(), "background_threshold must have the dtype of scores");
    check_same_device("background_threshold", *threshold, "maps", maps);
}

// -> labels [B, H, W] and, with a target, the confusion matrix [num_classes, num_classes] (else [0, 0]).
template <auto run>
std::tuple<Tensor, Tensor> decode_masks(const Tensor& maps, const Tensor& scores, int64_t height, int64_t width,
                                        const std::optional<Tensor>& threshold, const std::optional<Tensor>& target,
                                        int64_t num_classes) {
    check_maps("maps", maps);
    check(maps.size(1) > 0, "maps must have G >= 1, got ", shape_of(maps));
    check_size(height, width);
    check_scores(maps, scores, threshold);
    const int64_t batch = maps.size(0), groups = maps.size(1);
    if (target) {
        check_shape("target", *target, "[B, H, W]", {batch, height, width});
        check_dtype("target", *target, ScalarType::Long, "int64");
        check_same_device("target", *target, "maps", maps);
        check(num_classes > 0, "num_classes must be positive, got ", num_classes);
    }
    const int64_t table = target ? num_classes : 0;
    const bool known = scores.dim() == 2;
    Tensor labels = torch::stable::new_empty(maps, {batch, height, width}, ScalarType::Long);
    Tensor confusion = torch::stable::new_zeros(maps, {table, table}, ScalarType::Long);
    const Tensor dense_maps = dense(maps), dense_scores = dense(scores);
    const Tensor dense_threshold = threshold ? dense(*threshold) : scores;
    const Tensor dense_target = target ? dense(*target) : scores;
    const Storage storage = storage_of("maps", maps);
    DecodeParams params{dense_maps.const_data_ptr(),
                        known ? nullptr : dense_scores.const_data_ptr(),
                        known ? dense_scores.const_data_ptr<int64_t>() : nullptr,
                        threshold ? dense_threshold.const_data_ptr() : nullptr,
                        target ? dense_target.const_data_ptr<int64_t>() : nullptr,
                        labels.mutable_data_ptr<int64_t>(),
                        target ? confusion.mutable_data_ptr<int64_t>() : nullptr,
                        batch,
                        groups,
                        known ? 0 : scores.size(2),
                        table,
                        maps.size(2),
                        maps.size(3),
                        height,
                        width,
                        storage,
                        known ? storage : storage_of("scores", scores)};
    if (labels.numel() > 0) run(params, maps);
    return {labels, confusion};
}

}  // namespace gvit
