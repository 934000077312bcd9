// All blocks of a grid at once: they lie on the GPU together, and meet at a barrier in two halves. Under g++ what CUDA has for it
// comes from the emulator's emu.h.
#pragma once
#include "cuda.h"
#ifdef __CUDACC__

// A parameter that is read where it lies, not copied for each thread.
#define EFFNET_GRID_CONSTANT(type, name) const __grid_constant__ type name

namespace effnet_fast {

// Adds after all that this thread wrote or knows to be written; returns what was there.
__device__ __forceinline__ unsigned add_release(unsigned* p, unsigned value) {
  unsigned before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
  return before;
}
// What another block has written, and all that came before that there.
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Starts a grid whose blocks all run at the same time, or fails where the GPU has no room for that.
template <typename... Parameters, typename... Arguments> void launch_together(void (*kernel)(Parameters...), unsigned blocks,
                                                                              unsigned threads, size_t shared_bytes, void* stream,
                                                                              const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  launch_with(&attribute, kernel, blocks, threads, shared_bytes, stream, arguments...);
}

}  // namespace effnet_fast
#endif

namespace effnet_fast {

// Every thread of every block says that it has come so far: what it wrote until then, others may read after grid_wait, which is to
// be given what this returns. The counter is zero before its first use. A meeting adds 2^31 to it in all, however many blocks there
// are, so that its highest bit turns when the last one has come.
__device__ __forceinline__ unsigned grid_arrive(unsigned* counter) {
  __syncthreads();
  return threadIdx.x == 0 ? add_release(counter, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u) : 0;
}
// Waits for all the others. That one thread acquires and the block then meets is enough for all of its threads: no line that L1
// had before is read.
__device__ __forceinline__ void grid_wait(const unsigned* counter, unsigned before) {
  if (threadIdx.x == 0)
    while (((load_acquire(counter) ^ before) & 0x80000000u) == 0) {
    }
  __syncthreads();
}

}  // namespace effnet_fast
