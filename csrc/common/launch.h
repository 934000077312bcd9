// How a kernel is started, and how it starts: from compute capability 9.0 on before the one ahead of it in the stream has ended
// (programmatic dependent launch). A short kernel's launch takes as long as its work, and a long one's last blocks leave
// multiprocessors idle; so blocks come to their places early and wait there. Under g++ all of it comes from the emulator's emu.h.
#pragma once
#include "cuda.h"
#ifdef __CUDACC__
#include <atomic>

namespace effnet_fast {

// Every thread of every kernel calls both, and touches global memory only after the second: all that stands before in the stream
// has then ended and what it wrote is there. The kernel behind may start once every block has called the first; as it too waits
// for this one to end, and this one for those before, nothing is overtaken. Without a kernel ahead that lets it, they do nothing.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The compute capability, times ten, that the code which runs on the current device was compiled for: of PTX its own, not the
// device's. Whether a kernel waits was settled then. All of the module's kernels are compiled alike.
template <typename Kernel> int compiled_for(Kernel* kernel) {
  static std::atomic<int> known[64] = {};  // by device; 0: not asked yet
  int device = 0;
  EFFNET_CUDA_CHECK(cudaGetDevice(&device));
  std::atomic<int>* const place = device < 64 ? &known[device] : nullptr;
  if (const int capability = place ? place->load(std::memory_order_relaxed) : 0) return capability;
  cudaFuncAttributes attributes;
  EFFNET_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  if (place) place->store(attributes.ptxVersion, std::memory_order_relaxed);
  return attributes.ptxVersion;
}

// Starts a grid, `size` blocks of which in a row are a cluster; 1 needs no GPU that has them.
template <typename... Parameters, typename... Arguments> void launch_clusters(int size, void (*kernel)(Parameters...), dim3 grid,
                                                                              dim3 block, size_t shared_bytes, void* stream,
                                                                              const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (compiled_for(kernel) >= 90) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (size > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {unsigned(size), 1, 1};
  }
  EFFNET_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}
template <typename... Parameters, typename... Arguments> void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                                                     size_t shared_bytes, void* stream,
                                                                     const Arguments&... arguments) {
  launch_clusters(1, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace effnet_fast
#endif
