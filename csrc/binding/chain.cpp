// effnet_fast::chain_begin, chain_launch and chain_end: this thread's kernels on CUDA, started as one. The schemas are in
// effnet_fast/inference.
#include "chain.h"

namespace effnet_fast::binding {

#ifdef EFFNET_FAST_CUDA
thread_local std::unique_ptr<Chain> recorded;

void Chain::launch() {
  if (steps_.empty()) return;
  const std::vector<chain::Step> steps = std::exchange(steps_, {});  // gone, whether or not they start
  const torch::stable::accelerator::DeviceGuard guard(device_);
  launches += chain::launch_cuda(steps, dtype_, barrier_, current_cuda_stream(device_));
}

void before_other_kernels() {
  if (recorded) recorded->launch();
}
#else
void before_other_kernels() {}
#endif

namespace {

// From now on, until chain_end. barrier: 4 bytes, zero before their first use, of no two launches at the same time. On the CPU a
// chain takes nothing.
void chain_begin(const Tensor& barrier) {
  check(barrier.scalar_type() == ScalarType::Int && barrier.numel() == 1, "chain: barrier must be one int32");
#ifdef EFFNET_FAST_CUDA
  check(!recorded, "chain: this thread is recording one already");
  if (!barrier.is_cuda()) return;
  recorded = std::make_unique<Chain>(static_cast<unsigned*>(barrier.mutable_data_ptr()), barrier.get_device_index());
#endif
}

void chain_launch() { before_other_kernels(); }

// What was not launched is not. Returns how many launches there were.
int64_t chain_end() {
  int64_t launches = 0;
#ifdef EFFNET_FAST_CUDA
  if (recorded) launches = recorded->launches;
  recorded.reset();
#endif
  return launches;
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CompositeExplicitAutograd, m) {
  m.impl("chain_begin", TORCH_BOX(&chain_begin));
  m.impl("chain_launch", TORCH_BOX(&chain_launch));
  m.impl("chain_end", TORCH_BOX(&chain_end));
}

}  // namespace
}  // namespace effnet_fast::binding
