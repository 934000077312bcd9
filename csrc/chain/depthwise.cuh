// A depthwise convolution in a chain: a block takes a piece of an image's output pixels x 32 channels, a thread one pixel at a time
// x 4 channels, FFMA, x from global memory: neighbours share it in L1. Taps are fp32 in shared memory. The piece's sums are
// partial.
#pragma once
#include "step.cuh"

namespace effnet_fast::chain {

constexpr int kGroup = 32, kLanes = kGroup / 4, kSlots = kThreads / kLanes;  // channels, threads of a pixel, pixels

// Memory of a depthwise step.
template <int kKernel> struct DepthwiseWork {
  Vec<float, kGroup> taps[kKernel * kKernel];
  Affine norms[kGroup];
  float sums[kWarps][kGroup];
};

template <typename T, int kKernel, typename Wait>
__device__ __forceinline__ void depthwise_step(const Step& step, char* memory, const Wait& wait) {
  const depthwise::ForwardParams& p = step.depthwise;
  auto& work = *reinterpret_cast<DepthwiseWork<kKernel>*>(memory);
  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  const int pixels = p.out_height * p.out_width;
  const Ending ending = ending_of(p.activation);
  bool first = true;
  for (int item = blockIdx.x; item < step.items || first; item += gridDim.x) {
    const bool works = item < step.items;
    const int first_channel = item % step.across * kGroup, piece = item / step.across % step.parts;
    const int64_t image = item / step.across / step.parts;
    const int channels = works ? min(kGroup, p.channels - first_channel) : 0;
    if (!first) __syncthreads();  // the piece before is done
    for (int i = threadIdx.x; i < channels * kKernel * kKernel; i += kThreads) {
      const T tap = static_cast<const T*>(p.weight)[int64_t(first_channel) * kKernel * kKernel + i];
      work.taps[i % (kKernel * kKernel)].at[i / (kKernel * kKernel)] = to_float(tap);
    }
    if (int(threadIdx.x) < channels)
      work.norms[threadIdx.x] = before_silu<T>(fold_norm(p, first_channel + threadIdx.x), ending.silu);
    if (first) {
      wait();
    } else {
      __syncthreads();
    }
    first = false;
    if (!works) break;

    const int channel = lane * 4;
    const bool inside = channel < channels;
    const char* const x = pin_global(static_cast<const char*>(p.x) + 2 * (image * p.x_image + first_channel + channel));
    const int row_bytes = int(p.x_row) * 2, pixel_bytes = int(p.x_pixel) * 2;
    T* const y = static_cast<T*>(p.y) + (image * pixels * p.channels + first_channel + channel);
    const int last = int(int64_t(piece + 1) * pixels / step.parts);
    float sums[4] = {};
    for (int pixel = int(int64_t(piece) * pixels / step.parts) + slot; inside && pixel < last; pixel += kSlots) {
      const int row = pixel / p.out_width * p.stride - p.pad_top, column = pixel % p.out_width * p.stride - p.pad_left;
      const char* rows[kKernel];
      unsigned columns[kKernel];  // bytes from the first column of the image on
      bool row_inside[kKernel], column_inside[kKernel];
#pragma unroll
      for (int i = 0; i < kKernel; ++i) {
        row_inside[i] = unsigned(row + i) < unsigned(p.height);
        rows[i] = x + int64_t(row + i) * row_bytes;
        column_inside[i] = unsigned(column + i) < unsigned(p.width);
        columns[i] = unsigned(column + i) * pixel_bytes;
      }
      Vec<uint32_t, 2> seen[kKernel * kKernel];
#pragma unroll
      for (int i = 0; i < kKernel; ++i)
#pragma unroll
        for (int j = 0; j < kKernel; ++j) {
          seen[i * kKernel + j] = {};
          if (row_inside[i] && column_inside[j])
            seen[i * kKernel + j] = load<2>(reinterpret_cast<const uint32_t*>(rows[i] + columns[j]));
        }
      float v[4] = {};
#pragma unroll
      for (int tap = 0; tap < kKernel * kKernel; ++tap) {
        const Vec<float, 4> taps = load<4>(work.taps[tap].at + channel);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] += value_of<T>(seen[tap], e) * taps.at[e];
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = v[e] * work.norms[channel + e].scale + work.norms[channel + e].shift;
      end<T>(ending, v[0], v[1]);
      end<T>(ending, v[2], v[3]);
      const Vec<uint32_t, 2> out{round_pair<T>(v[0], v[1]), round_pair<T>(v[2], v[3])};
      store(reinterpret_cast<uint32_t*>(y + int64_t(pixel) * p.channels), out);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] += value_of<T>(out, e);
    }
    if (p.pieces == 0) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 8);
      sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 16);
    }
    if (threadIdx.x % 32 < kLanes) store(work.sums[threadIdx.x / 32] + channel, Vec<float, 4>{sums[0], sums[1], sums[2], sums[3]});
    __syncthreads();  // all warps' sums are there
    if (int(threadIdx.x) < channels) {
      float sum = 0.f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += work.sums[warp][threadIdx.x];
      p.partial[(image * p.pieces + piece) * p.channels + first_channel + threadIdx.x] = sum;
    }
  }
}

inline int plan_depthwise(Step& step, int blocks) {
  const depthwise::ForwardParams& p = step.depthwise;
  const int pixels = p.out_height * p.out_width;
  step.across = ceil_div(p.channels, kGroup);
  step.parts = p.pieces > 0 ? p.pieces : int(std::clamp<int64_t>(blocks / (step.across * p.batch), 1, pixels));
  step.items = int(p.batch) * step.parts * step.across;
  return p.kernel == 3 ? sizeof(DepthwiseWork<3>) : sizeof(DepthwiseWork<5>);
}

}  // namespace effnet_fast::chain
