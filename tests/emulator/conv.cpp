// With ONE_STEM it has its kernel for bf16, at most 32 channels and SiLU alone, which is soon compiled: for changed sources.
#include "conv/forward.cuh"

#include "kernels.h"

void emulated::conv(const effnet_fast::conv::Params& p, int multiprocessors, unsigned seed) {
  using namespace effnet_fast::conv;
  emu::state().order.seed(seed);
#ifdef ONE_STEM
  launch_stem<StemTraits<effnet_fast::bf16, 2, true>>(KernelParams{p}, multiprocessors, nullptr);
#else
  if (p.dtype == effnet_fast::DType::bf16) {
    launch_forward<effnet_fast::bf16>(p, multiprocessors, nullptr);
  } else {
    launch_forward<effnet_fast::fp16>(p, multiprocessors, nullptr);
  }
#endif
}
