// Large results in huge pages, where Linux gives them on request (transparent_hugepage "madvise").
//
// Memory above malloc's threshold is returned to the system when a tensor is freed, so that every call of an
// operator meets fresh pages. Of 4 KiB each, they can take longer to come by than the results that fill them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gvit {

// Asks for the whole huge pages inside a tensor that was just made; of no consequence for its values.
inline torch::stable::Tensor in_huge_pages(torch::stable::Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = 2 << 20;
    if (!tensor.is_cpu()) return tensor;
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t end = (begin + tensor.numel() * tensor.element_size()) / kPage * kPage;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
    return tensor;
}

}  // namespace gvit
