// The stem in a chain: 3x3 from up to 3 channels. A thread takes a pixel x 8 channels, FFMA; the taps are fp32 in shared memory, x
// comes from global memory: neighbours share it in L1.
#pragma once
#include "step.cuh"

namespace effnet_fast::chain {

// What a pixel of 8 output channels, from the lane's on, sees of x, times its taps: weights [in_channels][3][3][channels].
template <typename T, typename Source> __device__ __forceinline__ void add_stem_taps(const conv::Params& p, const float* weights,
                                                                                     int64_t image, int row, int column,
                                                                                     float (&v)[8]) {
  constexpr bool kBytes = std::is_same_v<Source, uint8_t>;
  constexpr int kMost = 3;  // input channels
  const Source* const x = pin_global(static_cast<const Source*>(p.x) + image * p.x_image);
  float seen[kMost][9];
#pragma unroll
  for (int c = 0; c < kMost; ++c)
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const int y_at = row + tap / 3, x_at = column + tap % 3;
      const bool real = c < p.in_channels && unsigned(y_at) < unsigned(p.height) && unsigned(x_at) < unsigned(p.width);
      seen[c][tap] = real ? to_float(x[c * p.x_channel + y_at * p.x_row + x_at * p.x_pixel]) : 0.f;
      if constexpr (kBytes)  // rounded as the images that other kernels are given
        if (real) seen[c][tap] = to_float(from_float<T>(seen[c][tap] * p.pixels[c] + p.pixels[p.in_channels + c]));
    }
#pragma unroll
  for (int c = 0; c < kMost; ++c) {
    if (c == p.in_channels) break;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Vec<float, 4> w = load<4>(weights + ((c * 9 + tap) * p.channels + 4 * half));
#pragma unroll
        for (int e = 0; e < 4; ++e) v[4 * half + e] += seen[c][tap] * w.at[e];
      }
  }
}

template <typename T, typename Wait> __device__ __forceinline__ void stem_step(const Step& step, char* memory, const Wait& wait) {
  const conv::Params& p = step.stem;
  const int taps = p.in_channels * 9;
  float* const weights = reinterpret_cast<float*>(memory);
  Affine* const norms = reinterpret_cast<Affine*>(weights + taps * p.channels);
  const Ending ending = ending_of(p.activation);
  for (int i = threadIdx.x; i < taps * p.channels; i += kThreads)
    weights[i % taps * p.channels + i / taps] = to_float(static_cast<const T*>(p.weight)[i]);
  if (int(threadIdx.x) < p.channels) norms[threadIdx.x] = before_silu<T>(fold_norm(p, threadIdx.x), ending.silu);
  wait();
  const int pixels = p.out_height * p.out_width;
  for (int i = int(blockIdx.x) * kThreads + threadIdx.x; i < step.items; i += gridDim.x * kThreads) {
    const int channel = i % step.across * 8, at = i / step.across, pixel = at % pixels;
    const int row = pixel / p.out_width * p.stride - p.pad_top, column = pixel % p.out_width * p.stride - p.pad_left;
    float v[8] = {};
    if (p.pixels) {
      add_stem_taps<T, uint8_t>(p, weights + channel, at / pixels, row, column, v);
    } else {
      add_stem_taps<T, T>(p, weights + channel, at / pixels, row, column, v);
    }
    Vec<uint32_t, 4> out;
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const Vec<Affine, 2> norm = load<2>(norms + channel + e);
      float v0 = v[e] * norm.at[0].scale + norm.at[0].shift, v1 = v[e + 1] * norm.at[1].scale + norm.at[1].shift;
      end<T>(ending, v0, v1);
      out.at[e / 2] = round_pair<T>(v0, v1);
    }
    store(reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + (int64_t(at) * p.channels + channel)), out);
  }
}

inline int plan_stem(Step& step) {
  const conv::Params& p = step.stem;
  step.across = p.channels / 8;
  step.items = int(p.batch) * p.out_height * p.out_width * step.across;
  return p.channels * (p.in_channels * 9 * int(sizeof(float)) + int(sizeof(Affine)));
}

}  // namespace effnet_fast::chain
