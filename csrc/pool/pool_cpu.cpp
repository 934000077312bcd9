// The global average pool on the CPU, channels_last.
//
// A thread owns whole images, and of those a vector of W channels at a time: their sum stays in a register, in chunks of kChunk
// pixels, and x is read once. Memory binds.
#include <algorithm>

#include "../common/parallel.h"
#include "../common/simd.h"
#include "params.h"

namespace effnet_fast::pool {
namespace {

constexpr int kChunk = 64;           // pixels added up before they join a total: a longer chain rounds worse than PyTorch
constexpr int64_t kGrain = 1 << 17;  // inputs worth a thread: waking a sleeping one costs about 30 us

struct Task {
  const Params* params;
  int64_t first, last;  // images
};

template <int W, typename T> EFFNET_INLINE void run_task(const Task& t) {
  using namespace simd;
  const Params& p = *t.params;
  for (int64_t image = t.first; image < t.last; ++image) {
    const T* x = static_cast<const T*>(p.x) + image * p.pixels * p.channels;
    T* y = static_cast<T*>(p.y) + image * p.channels;
    for (int c = 0; c < p.channels; c += W) {
      const int channel = std::min(c, p.channels - W);  // the last vector computes some of its neighbour's again
      Float<W> total{};
      for (int64_t start = 0; start < p.pixels; start += kChunk) {
        Float<W> sum{};
        const int64_t end = std::min(p.pixels, start + kChunk);
        for (int64_t pixel = start; pixel < end; ++pixel) sum += load<W>(x + pixel * p.channels + channel);
        total += sum;
      }
      store<W>(y + channel, total / float(p.pixels));
    }
  }
}

template <int W> EFFNET_INLINE void run_any(const Task& t) {
  switch (t.params->dtype) {
    case DType::fp32: return run_task<W, float>(t);
    case DType::bf16: return run_task<W, bf16>(t);
    case DType::fp16: return run_task<W, fp16>(t);
  }
}

EFFNET_PER_WIDTH(run, run_any)

}  // namespace

void average_cpu(const Params& p) {
  const int width = simd::width_for(p.channels);
  parallel_for(p.batch, kGrain / (p.pixels * p.channels + 1) + 1,
               [&](int64_t begin, int64_t end) { run(Task{&p, begin, end}, width); });
}

}  // namespace effnet_fast::pool
