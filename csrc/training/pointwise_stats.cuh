// Training's pointwise convolution on CUDA for half types, channels_last:  y = (activation(norm(x)) * gate) W^T, and y's mean and
// variance per channel from the same pass, added up in fixed order (no atomics; the same bits each time).
//
// It is the pointwise kernel on the tensor cores (../pointwise/forward.cuh: a block makes tiles of 64 pixels x kColumns channels, x
// through a ring) with another beginning and end. x is normed, activated and gated in the fragments that mma takes, once
// for every tile of columns; the folded norm of all channels stays in shared memory. y leaves as it is; who stores 16
// bytes of a row has the same 8 channels in every row, and adds them up as they pass.
// Deviations are taken from the mean of a thread's first rows, rounded as y is, and added up in floats over 16 rows and then in
// doubles, so that the variance loses few digits. A block writes one piece; ends.cuh adds pieces up. SiLU is the inference
// kernel's, in bf16 by tanh (../common/epilogue.cuh says how far off); the backward's is exact to rounding.
//
// Bytes an output: 2 + 2 C / K, where C is few an expansion and where K is few a projection. Operations: C multiply-adds. From the
// SASS of sm_90, an element of x takes about 14 lane-instructions for each tile of columns, with norm, SiLU, gate and what brings
// it, and an output that is stored 5.5 for its sums. Instructions should bind, as in the inference kernel, and not HBM: 128 images
// of 24 to 144 channels of 56x56, or of 144 to 24, are 32 us of bytes. Not timed on a GPU yet. What this replaces took an H200 157
// and 201 us there (benchmarks/results/training-trials-cuda.json, products): a pass that writes what is activated, cuDNN's product,
// and a pass that reads its result. The inference kernel, which has a norm and SiLU to do at its end, takes 63
// (benchmarks/results/kernels-cuda.json); 70 and 75 are expected here.
#pragma once
#include "../pointwise/forward.cuh"
#include "activation.cuh"
#include "ends.cuh"
#include "params.h"

namespace effnet_fast::training {

struct PointwiseLaunch : pointwise::KernelParams {
  const float* norm;  // [3, in_channels] of x, or null
  Range range;        // of x's activation
  float* partial;     // [pieces, 3, out_channels]
};

// Of the 8 channels of a lane's 16 bytes of a row.
template <typename T> class Seen {
 public:
  // rows(f) calls f(anything, place in shared memory) for each of the lane's rows. Only the first ones are looked at.
  template <typename F> __device__ __forceinline__ void begin(const F& rows) {
    if (count_ > 0) return;
    float sum[8] = {};
    int first = 0;
    rows([&](char*, const char* here) {
      const Vec<uint32_t, 4> piece = load<4>(reinterpret_cast<const uint32_t*>(here));
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += value_of<T>(piece, e);
      ++first;
    });
    const float share = reciprocal_fast(float(max(first, 1)));
#pragma unroll
    for (int e = 0; e < 4; ++e) shift_.at[e] = round_pair<T>(sum[2 * e] * share, sum[2 * e + 1] * share);
  }
  __device__ __forceinline__ void add(const Vec<uint32_t, 4>& piece) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float apart = value_of<T>(piece, e) - value_of<T>(shift_, e);
      sum_[e] += apart;
      squares_[e] += apart * apart;
    }
    ++count_;
  }
  __device__ __forceinline__ void end() {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      all_[e] += double(sum_[e]);
      all_squares_[e] += double(squares_[e]);
      sum_[e] = squares_[e] = 0.f;
    }
  }
  __device__ __forceinline__ Moments moments(int e) const {
    const double shift = value_of<T>(shift_, e), count = count_;
    return {count, all_[e] + count * shift, all_squares_[e] + (2. * all_[e] + count * shift) * shift};
  }

 private:
  int count_ = 0;
  Vec<uint32_t, 4> shift_{};  // about the mean, as y is stored
  float sum_[8] = {}, squares_[8] = {};
  double all_[8] = {}, all_squares_[8] = {};
};

template <typename T_, int kColumns_, bool kNormed_, bool kGate_> struct PointwiseStats
    : pointwise::Traits<T_, kColumns_, 4, 1, kGate_, false> {
  using Base = pointwise::Traits<T_, kColumns_, 4, 1, kGate_, false>;
  using T = T_;
  using Params = PointwiseLaunch;
  using Seen = training::Seen<T>;
  static constexpr const char* kOp = "pointwise_conv_stats";
  static constexpr bool kTrains = true, kNormed = kNormed_;
  static constexpr int kBlocks = kColumns_ > 48 ? 3 : 4;       // an SM, without spills
  static constexpr int kUnrolled = kColumns_ > 48 ? 4 : 1;     // likewise
  static constexpr int kGroups = Base::kWarps * Base::kTaken;  // of lanes that see the same channels
  static_assert(kGroups * Base::kColumns * int(sizeof(Moments)) <=
                Base::kFixedBytes + 2 * Base::kStepBytes + Base::kWeightBytes);  // they come where all else was
  static_assert(kNormed || !kGate_);

  // Of x's channels; those that fill the last step up have zeros.
  __host__ __device__ static int norms(const Params& p) {
    return kNormed ? ceil_div(p.in_channels, pointwise::kDepth) * pointwise::kDepth : 0;
  }
  static int norm_bytes(const Params& p) { return norms(p) * int(sizeof(Affine)); }
  __device__ __forceinline__ static void fold(const Params& p, Affine* to) {
    for (int c = threadIdx.x; c < norms(p); c += Base::kThreads) {
      const float *const scale = p.norm + p.in_channels, *const bias = scale + p.in_channels;
      to[c] = c < p.in_channels ? before_silu<T>({scale[c], bias[c] - p.norm[c] * scale[c]}, p.range.silu) : Affine{};
    }
  }

  // Fragments of x become those of what is convolved. norms, gates: from this lane's first channel on; gates of images, kGateRow
  // apart.
  __device__ __forceinline__ static void read(const Params& p, uint32_t (&a)[1][4], const Affine* norms, const char* gates,
                                              int images) {
    if constexpr (!kNormed) return;
    with_silu<false>(p.range, [&](auto silu) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Vec<Affine, 2> norm = load<2>(norms + half * 8);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          uint32_t& pair = a[0][half * 2 + row];
          float v0 = to_float(T{uint16_t(pair)}) * norm.at[0].scale + norm.at[0].shift;
          float v1 = to_float(T{uint16_t(pair >> 16)}) * norm.at[1].scale + norm.at[1].shift;
          if constexpr (silu.value) {
            silu_of_two<T>(v0, v1);
          } else {
            v0 = clamp(v0, p.range.low, p.range.high), v1 = clamp(v1, p.range.low, p.range.high);
          }
          if constexpr (kGate_) {
            const char* const at = gates + (Base::kGateAt + (images >> 2 * row & 3) * pointwise::kGateRow + half * 32);
            const Vec<float, 2> gate = load<2>(reinterpret_cast<const float*>(at));
            v0 *= gate.at[0], v1 *= gate.at[1];
          }
          pair = round_pair<T>(v0, v1);
        }
      }
    });
  }

  // Each thread brings what it has seen, of row `taken` of every kTaken and the 8 channels of `piece`.
  __device__ __forceinline__ static void finish(const Params& p, const Seen& seen, char* shared, int taken, int piece,
                                                int first_channel, int columns, int number) {
    Moments* const all = reinterpret_cast<Moments*>(shared);
    if (taken < Base::kTaken)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        all[(int(threadIdx.x) / 32 * Base::kTaken + taken) * Base::kColumns + piece * 8 + e] = seen.moments(e);
    __syncthreads();
    if (int(threadIdx.x) >= columns) return;
    Moments total = all[threadIdx.x];
    for (int group = 1; group < kGroups; ++group) total.join(all[group * Base::kColumns + threadIdx.x]);
    write_piece(total, p.partial, number, p.out_channels, first_channel + threadIdx.x);
  }
};

template <class Tr>
void launch_stats(const PointwiseLaunch& p, const Stats& made, const pointwise::Gpu& gpu, const Allocate& allocate, void* stream) {
  pointwise::Launch<Tr> launch = pointwise::launch_of<Tr>(p, gpu);
  launch.p.partial = allocate(int64_t(launch.pieces) * 3 * p.out_channels);
  pointwise::start(launch, stream);
  finish_stats(launch.p.partial, launch.pieces, p.out_channels, made, stream);
}

inline PointwiseLaunch launch_of(const Pointwise& given, const Stats& made) {
  pointwise::Params p{};
  p.x = given.read.x;
  p.weight = given.weight;
  p.gate = given.read.gate;
  p.y = made.y;
  p.rows = given.images * given.pixels;
  p.pixels = given.pixels;
  p.in_channels = given.in_channels;
  p.out_channels = given.out_channels;
  p.dtype = given.dtype;
  p.weight_dtype = given.weight_dtype;
  return {pointwise::in_32_bits("pointwise_conv_stats", p), given.read.norm, Range(given.read.activation), nullptr};
}

// x, the weight, the norm, the gate and y must be 16-byte aligned.
template <typename T>
void launch_stats(const Pointwise& given, const Stats& made, const pointwise::Gpu& gpu, const Allocate& allocate, void* stream) {
  const PointwiseLaunch p = launch_of(given, made);
  const auto with_columns = [&](auto normed, auto gate) {
    constexpr bool kNormed = normed.value, kGate = gate.value;
    if constexpr (kNormed) {  // projections; what expands has more channels
      if (p.out_channels <= 32) return launch_stats<PointwiseStats<T, 32, kNormed, kGate>>(p, made, gpu, allocate, stream);
      if (p.out_channels <= 48) return launch_stats<PointwiseStats<T, 48, kNormed, kGate>>(p, made, gpu, allocate, stream);
    }
    launch_stats<PointwiseStats<T, 96, kNormed, kGate>>(p, made, gpu, allocate, stream);
  };
  using std::false_type, std::true_type;
  if (!p.norm) return with_columns(false_type{}, false_type{});
  p.gate ? with_columns(true_type{}, true_type{}) : with_columns(true_type{}, false_type{});
}

}  // namespace effnet_fast::training
