// The mean over an image in a chain: a block takes 64 channels of an image, a thread 4 of them of every 16th pixel.
#pragma once
#include "step.cuh"

namespace effnet_fast::chain {

// Memory of a mean: the sums of each 16th pixel, of 64 channels.
constexpr int kMeanGroup = 64, kMeanLanes = kMeanGroup / 4, kMeanSlots = kThreads / kMeanLanes;
using MeanWork = float[kMeanSlots][kMeanGroup];

template <typename T, typename Wait> __device__ __forceinline__ void pool_step(const Step& step, char* memory, const Wait& wait) {
  const pool::Params& p = step.pool;
  auto& sums = *reinterpret_cast<MeanWork*>(memory);
  const int lane = threadIdx.x % kMeanLanes * 4, slot = threadIdx.x / kMeanLanes;
  wait();
  for (int item = blockIdx.x; item < step.items; item += gridDim.x) {
    const int first_channel = item % step.across * kMeanGroup, channels = min(kMeanGroup, p.channels - first_channel);
    const int64_t image = item / step.across;
    if (item != int(blockIdx.x)) __syncthreads();  // the sums before are read
    float sum[4] = {};
    const T* const x = pin_global(static_cast<const T*>(p.x) + (image * p.pixels * p.channels + first_channel + lane));
    if (lane < channels)
#pragma unroll 4
      for (int pixel = slot; pixel < p.pixels; pixel += kMeanSlots) {
        const Vec<uint32_t, 2> v = load<2>(reinterpret_cast<const uint32_t*>(x + int64_t(pixel) * p.channels));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += value_of<T>(v, e);
      }
    store(sums[slot] + lane, Vec<float, 4>{sum[0], sum[1], sum[2], sum[3]});
    __syncthreads();  // all sums are there
    if (int(threadIdx.x) >= channels) continue;
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kMeanSlots; ++i) total += sums[i][threadIdx.x];
    static_cast<T*>(p.y)[image * p.channels + first_channel + threadIdx.x] = from_float<T>(total / float(p.pixels));
  }
}

inline int plan_pool(Step& step) {
  step.across = ceil_div(step.pool.channels, kMeanGroup);
  step.items = int(step.pool.batch) * step.across;
  return sizeof(MeanWork);
}

}  // namespace effnet_fast::chain
