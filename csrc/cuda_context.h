// The tensor's GPU made current, and its current stream: the only user of the C shim's CUDA part.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "csrc/tensor_checks.h"

namespace gvit {

class CudaContext {
  public:
    explicit CudaContext(const Tensor& tensor) : guard_(tensor.get_device_index()) {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }

    cudaStream_t stream() const { return stream_; }

    // Reports what the last launch left behind, such as a configuration the GPU does not take.
    void check_launch() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_;
};

}  // namespace gvit
