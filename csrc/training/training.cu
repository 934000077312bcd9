// Starts training's CUDA kernels.
#include "depthwise_launch.cuh"

namespace effnet_fast::training {
namespace {

// Calls f(type, window, multiprocessors of the current device).
template <typename F> void with_instance(const Depthwise& p, const F& f) {
  int device = 0, multiprocessors = 0;
  EFFNET_CUDA_CHECK(cudaGetDevice(&device));
  EFFNET_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  with_dtype(p.dtype, [&](auto type) { with_window(p, [&](auto window) { f(type, window, multiprocessors); }); });
  EFFNET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void depthwise_stats_cuda(const Depthwise& p, const Stats& made, const Allocate& allocate, void* stream) {
  with_instance(p, [&](auto type, auto window, int multiprocessors) {
    launch_stats<decltype(type), decltype(window)>(p, made, allocate, multiprocessors, stream);
  });
}

void depthwise_backward_cuda(const Depthwise& p, const Gradients& made, const Allocate& allocate, void* stream) {
  with_instance(p, [&](auto type, auto window, int multiprocessors) {
    launch_backward<decltype(type), decltype(window)>(p, made, allocate, multiprocessors, stream);
  });
}

}  // namespace effnet_fast::training
