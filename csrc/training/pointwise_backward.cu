// Starts the CUDA kernels of pointwise_backward.cuh.
#include "pointwise_backward.cuh"

namespace effnet_fast::training {

void pointwise_backward_cuda(const Pointwise& p, const Gradients& made, const Allocate& allocate, void* stream) {
  const pointwise::Gpu gpu = pointwise::this_gpu();
  if (p.dtype == DType::bf16) {
    launch_backward<bf16>(p, made, gpu, allocate, stream);
  } else {
    launch_backward<fp16>(p, made, gpu, allocate, stream);
  }
  EFFNET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace effnet_fast::training
