// Starts the CUDA kernels of forward.cuh.
#include "forward.cuh"

namespace effnet_fast::depthwise {

void forward_cuda(const ForwardParams& p, void* stream) {
  int device = 0, multiprocessors = 0;
  EFFNET_CUDA_CHECK(cudaGetDevice(&device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  with_dtype(p.dtype, [&](auto type) { launch_forward<decltype(type)>(p, multiprocessors, stream); });
  EFFNET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace effnet_fast::depthwise
