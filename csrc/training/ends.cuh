// How statistics and sums that blocks gather apart become one: each block writes a piece, and a second kernel adds the pieces up,
// in fixed order.
#pragma once
#include "../common/cuda.h"
#include "params.h"

namespace effnet_fast::training {

// Of so many values, about zero. In doubles: of 53 bits enough are left when the square of the mean is taken off.
struct Moments {
  double count, sum, squares;
  __device__ __forceinline__ void join(const Moments& other) {
    count += other.count;
    sum += other.sum;
    squares += other.squares;
  }
  __device__ __forceinline__ double mean() const { return sum / count; }
  __device__ __forceinline__ double about_mean() const {
    const double left = squares - sum * mean();
    return left < 0. ? 0. : left;
  }
};

// Of a block, to pieces [pieces, 3, channels]: count, mean, squares about it.
__device__ __forceinline__ void write_piece(const Moments& of_block, float* pieces, int number, int channels, int channel) {
  float* const to = pieces + int64_t(number) * 3 * channels + channel;
  to[0] = float(of_block.count);
  to[channels] = of_block.count > 0. ? float(of_block.mean()) : 0.f;
  to[2 * int64_t(channels)] = of_block.count > 0. ? float(of_block.about_mean()) : 0.f;
}

// Threads of the kernels that end the work: for 8 channels, 32 rows of every 32nd piece.
constexpr int kFinishChannels = 8, kRows = 32;

// Adds up what the kRows threads of a channel hold; the sum is the first one's.
template <typename S> __device__ __forceinline__ void add_rows(S* shared, S& mine, int row, int channel) {
  shared[row * kFinishChannels + channel] = mine;
  for (int half = kRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row >= half) continue;
    mine.join(shared[(row + half) * kFinishChannels + channel]);
    shared[row * kFinishChannels + channel] = mine;
  }
}

namespace {  // two .cu files have these

// mean[c] and var[c] of the pieces. Grid: x = kFinishChannels each.
__global__ void __launch_bounds__(kFinishChannels* kRows)
    finish_stats_kernel(const float* partial, int pieces, int channels, float* mean, float* var) {
  EFFNET_DYNAMIC_SHARED(Moments, shared);
  const int lane = threadIdx.x % kFinishChannels, row = threadIdx.x / kFinishChannels, c = blockIdx.x * kFinishChannels + lane;
  Moments moments{};
#pragma unroll 8
  for (int piece = row; c < channels && piece < pieces; piece += kRows) {
    const float* at = partial + int64_t(piece) * 3 * channels + c;
    const double count = at[0], its_mean = at[channels];
    moments.join({count, count * its_mean, at[2 * int64_t(channels)] + count * its_mean * its_mean});
  }
  add_rows(shared, moments, row, lane);
  if (row > 0 || c >= channels) return;
  mean[c] = float(moments.mean());
  var[c] = float(moments.about_mean() / moments.count);
}

// Starts that.
void finish_stats(const float* pieces, int count, int channels, const Stats& made, void* stream) {
  EFFNET_LAUNCH(finish_stats_kernel, dim3(unsigned(ceil_div(channels, kFinishChannels))), dim3(kFinishChannels * kRows),
                kFinishChannels * kRows * sizeof(Moments), stream, pieces, count, channels, made.mean, made.var);
}

}  // namespace

}  // namespace effnet_fast::training
