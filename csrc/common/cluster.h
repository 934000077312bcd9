// Thread-block clusters: the barrier of a cluster's blocks, in two halves, and their shared memory. On a GPU without clusters
// (compute capability below 9.0) a block is one of its own. Under g++ all of it comes from the emulator's emu.h.
#pragma once
#include "cuda.h"
#ifdef __CUDACC__

namespace effnet_fast {

// Every thread of every block of the cluster says that it has come so far ...
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// The same without a word on what was written before.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
// ... and waits for all the others: what they wrote before is there.
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}
// The same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float* cluster_peer(float* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  float* peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(shared), "r"(rank));
  return peer;
#else
  return shared;
#endif
}

// Starts a grid of `blocks`, `size` of which in a row are a cluster; 1 needs no GPU that has them.
template <typename... Parameters, typename... Arguments> void launch_cluster(void (*kernel)(Parameters...), unsigned blocks,
                                                                             unsigned threads, int size, size_t shared_bytes,
                                                                             void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(size), 1, 1};
  launch_with(size > 1 ? &attribute : nullptr, kernel, blocks, threads, shared_bytes, stream, arguments...);
}

}  // namespace effnet_fast
#endif
