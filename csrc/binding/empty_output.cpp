// Results of the CPU's kernels, and effnet_fast::return_memory, whose schema is in effnet_fast/inference.
#include <pthread.h>

#include "../common/memory.h"
#include "conv.h"

namespace effnet_fast::binding {
namespace {

constexpr size_t kRecycled = 1 << 20;  // bytes from which on

// Results may outlive everything else in the process, so it is never destroyed.
Recycler& recycler() {
  static Recycler& made = []() -> Recycler& {
    pthread_atfork([] { recycler().lock(); }, [] { recycler().unlock(); }, [] { recycler().unlock(); });
    return *new Recycler;
  }();
  return made;
}

}  // namespace

Tensor empty_output(const Tensor& x, const ConvShape& s, ScalarType dtype) {
  const int64_t images = x.size(0), channels = s.out_channels, height = s.out_height, width = s.out_width;
  const bool is_half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  const size_t bytes = size_t(images) * channels * height * width * (is_half ? 2 : 4);
  if (!x.is_cpu() || bytes < kRecycled || (!is_half && dtype != ScalarType::Float))
    return torch::stable::empty({images, channels, height, width}, dtype, std::nullopt, x.device(), std::nullopt,
                                MemoryFormat::ChannelsLast);
  return torch::stable::from_blob(recycler().take(bytes), {images, channels, height, width},
                                  {channels * height * width, 1, channels * width, channels}, x.device(), dtype,
                                  [](void* data) { recycler().give_back(data); });
}

namespace {

void return_memory() { recycler().return_pages(); }

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CompositeExplicitAutograd, m) { m.impl("return_memory", TORCH_BOX(&return_memory)); }

}  // namespace

}  // namespace effnet_fast::binding
