// Argument checks of the C++ entries, in one order (layout, shape, dtype, device) and one wording: the
// argument, what was wanted, what came. The public Python functions check first and say the same; these
// keep a direct call of `torch.ops.groupvit_fast.*` from ever reading outside a tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "csrc/launchers.h"

namespace gvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool condition, const Parts&... message) {
    if (condition) return;
    std::ostringstream text;
    ((text << message), ...);
    throw std::runtime_error(text.str());
}

inline std::string shape_of(const Tensor& tensor) {
    std::ostringstream text;
    text << "shape [";
    for (int64_t d = 0; d < tensor.dim(); ++d) text << (d == 0 ? "" : ", ") << tensor.size(d);
    text << "]";
    return text.str();
}

// `sizes` lists what each dimension must be; -1 is any size.
inline void check_shape(const char* name, const Tensor& tensor, const char* letters,
                        std::initializer_list<int64_t> sizes) {
    bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t d = 0;
    for (const int64_t size : sizes) {
        same = same && (size < 0 || tensor.size(d) == size);
        ++d;
    }
    if (same) return;
    std::ostringstream wanted;
    for (const int64_t size : sizes) {
        wanted << (wanted.tellp() > 0 ? ", " : "");
        size < 0 ? wanted << "any" : wanted << size;
    }
    check(false, name, " must be ", letters, " with sizes [", wanted.str(), "], got ", shape_of(tensor));
}

inline Storage storage_of(const char* name, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Double: return Storage::float64;
        case ScalarType::Float: return Storage::float32;
        case ScalarType::BFloat16: return Storage::bfloat16;
        case ScalarType::Half: return Storage::float16;
        default: break;
    }
    check(false, name, " must be float32, float64, bfloat16 or float16, got dtype number ",
          static_cast<int>(tensor.scalar_type()));
    return Storage::float32;
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType wanted, const char* wanted_name) {
    check(tensor.scalar_type() == wanted, name, " must be ", wanted_name, ", got dtype number ",
          static_cast<int>(tensor.scalar_type()));
}

inline void check_same_device(const char* name, const Tensor& tensor, const char* owner, const Tensor& other) {
    check(tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
          " must be on the device of ", owner);
}

// By the C shim, which the dispatcher's new_empty and transpose take several times as long as; of the dtype of
// `like`, or of another, by the shim's number of it.
template <size_t dims>
Tensor empty_strided(const Tensor& like, const int64_t (&sizes)[dims], const int64_t (&strides)[dims],
                     std::optional<int32_t> other_dtype = std::nullopt) {
    int32_t dtype, device_type, device_index;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, other_dtype.value_or(dtype),
                                                           device_type, device_index, &handle));
    return Tensor(handle);
}

template <size_t dims>
Tensor empty(const Tensor& like, const int64_t (&sizes)[dims], std::optional<int32_t> other_dtype = std::nullopt) {
    int64_t strides[dims];
    strides[dims - 1] = 1;
    for (size_t d = dims - 1; d > 0; --d) strides[d - 1] = strides[d] * larger<int64_t>(sizes[d], 1);
    return empty_strided(like, sizes, strides, other_dtype);
}

inline Tensor dense(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_same_kind(const char* name, const Tensor& tensor, const char* owner, const Tensor& other) {
    check(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ", owner);
    check_same_device(name, tensor, owner, other);
}

// Float64 for float64, float32 for all others: the type of accumulation and of saved statistics.
inline ScalarType statistic_type(const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Rows with neighbouring elements; the other strides may be anything, such as 0 for an expanded tensor.
inline Tensor dense_rows(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// A [B, rows, columns] or [B, H, rows, columns] tensor whose rows are dense.
inline Matrices matrices(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), last == 3 ? tensor.stride(1) : 0,
            tensor.stride(last - 1)};
}

}  // namespace gvit
