// Starts the CUDA kernels of pointwise_stats.cuh.
#include "pointwise_stats.cuh"

namespace effnet_fast::training {

void pointwise_stats_cuda(const Pointwise& p, const Stats& made, const Allocate& allocate, void* stream) {
  const pointwise::Gpu gpu = pointwise::this_gpu();
  if (p.dtype == DType::bf16) {
    launch_stats<bf16>(p, made, gpu, allocate, stream);
  } else {
    launch_stats<fp16>(p, made, gpu, allocate, stream);
  }
  EFFNET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace effnet_fast::training
