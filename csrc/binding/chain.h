// CUDA kernels that this thread's chain may take in place of starting them: ../chain.
#pragma once
#include <memory>
#include <vector>

#include "../chain/params.h"
#include "torch.h"

#ifdef EFFNET_FAST_CUDA
namespace effnet_fast::binding {

// The kernels that wait to be started as one, in a thread that records a chain.
class Chain {
 public:
  Chain(unsigned* barrier, int32_t device) : barrier_(barrier), device_(device) {}

  // Whether the kernel will be started with the others.
  template <typename P> bool take(const P& p, int32_t device) {
    if (device != device_ || !chain::takes(p)) return false;
    if (p.dtype != dtype_) launch();
    dtype_ = p.dtype;
    if constexpr (std::is_constructible_v<chain::Step, P>) steps_.emplace_back(p);
    return true;
  }
  void launch();
  int launches = 0;

 private:
  std::vector<chain::Step> steps_;
  DType dtype_ = DType::bf16;
  unsigned* barrier_;
  int32_t device_;
};
extern thread_local std::unique_ptr<Chain> recorded;

// Starts a kernel on the current device's current stream, after what the chain has, or with that.
template <typename P> void start(const P& p, void (*kernel)(const P&, void*), int32_t device) {
  if (recorded && recorded->take(p, device)) return;
  before_other_kernels();
  kernel(p, current_cuda_stream(device));
}

}  // namespace effnet_fast::binding
#endif
