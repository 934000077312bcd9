// Starts the CUDA kernels of forward.cuh.
#include "forward.cuh"

namespace effnet_fast::pointwise {

void forward_cuda(const Params& p, void* stream) {
  const Gpu gpu = this_gpu();
  if (p.dtype == DType::bf16) {
    launch_forward<bf16>(p, gpu, stream);
  } else {
    launch_forward<fp16>(p, gpu, stream);
  }
  EFFNET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace effnet_fast::pointwise
