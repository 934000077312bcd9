// Starts the CUDA kernel of forward.cuh.
#include "forward.cuh"

namespace effnet_fast::conv {

void forward_cuda(const Params& p, void* stream) {
  int device = 0, multiprocessors = 0;
  EFFNET_CUDA_CHECK(cudaGetDevice(&device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (p.dtype == DType::bf16) {
    launch_forward<bf16>(p, multiprocessors, stream);
  } else {
    launch_forward<fp16>(p, multiprocessors, stream);
  }
  EFFNET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace effnet_fast::conv
