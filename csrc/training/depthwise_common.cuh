// What training's depthwise kernels share: how work is cut, how rows come in, the norm of what is read, and how
// the sums that blocks gather apart become one.
//
// A block owns 32 channels. A lane owns V neighbouring ones, so that 32 / V lanes, a group, own a strip of columns, and slide down
// it; the V groups of a warp work at the same rows, so that whether a row is inside the image is the same for all of it. Rows come
// by cp.async into a ring of steps of the warp's own, several steps before they are used: no barrier holds warps together, and
// bytes in flight cost no registers. What is not made of whole 16-byte pieces is copied there element by element, V = 1.
// The sums of a block's groups are added up in shared memory, and each block writes one piece; a second kernel adds up pieces in
// fixed order.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/sliding.cuh"
#include "../common/tensor_core.h"
#include "activation.cuh"
#include "ends.cuh"
#include "params.h"

namespace effnet_fast::training {

constexpr int kTile = 32, kWarps = 4, kThreads = 32 * kWarps;  // channels, warps and threads of a block

template <int kKernel_, int kStride_> struct Window {
  static constexpr int kKernel = kKernel_, kStride = kStride_, kTaps = kKernel * kKernel;
  static constexpr int kLive = ceil_div(kKernel, kStride), kBodyRows = kLive * kStride;  // of the loop over rows
};

// What is compiled for: type, window, kAligned, where pixels are made of whole 16-byte pieces, and kSilu, where all activations are
// that.
template <typename T_, class W, bool kAligned_, bool kSilu_> struct Instance : Window<W::kKernel, W::kStride> {
  using T = T_;
  static constexpr bool kAligned = kAligned_, kSilu = kSilu_;
};

// How tasks are numbered: first by strips of columns and images, of which a warp takes a few at once, then by segments of rows.
struct Cut {
  int strips, units, rows, pieces, tasks;  // tasks = units * segments
};

// As many segments as make the most loaded multiprocessor end first, when each row costs the same and each task some rows more.
// Most warps get one task.
inline Cut cut_of(const Depthwise& p, int width, int height, int columns, int together, int body_rows, int multiprocessors) {
  constexpr int kMorePieces = 64, kTaskRows = 5;  // tasks begin with rows that repeat, and wait for the first
  const int64_t strips = ceil_div(width, columns), units = ceil_div(p.images * strips, together);
  const int64_t tiles = ceil_div(p.channels, kTile), bodies = ceil_div(height, body_rows);
  constexpr int64_t limit = std::numeric_limits<int>::max() / 2;
  if (p.images * strips * height > limit || std::max(int64_t(p.width), int64_t(p.out_width)) * p.channels > limit)
    throw std::runtime_error("depthwise: the images are too many or too wide for one launch");
  Cut best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t segments = 1; segments <= std::max<int64_t>(bodies / 2, 1); ++segments) {
    const int64_t rows = ceil_div(bodies, segments) * body_rows, tasks = units * ceil_div(int64_t(height), rows);
    const int64_t pieces = std::min<int64_t>(ceil_div(tasks, kWarps), kMorePieces * ceil_div(multiprocessors, tiles));
    const int64_t cost = ceil_div(tiles * pieces, multiprocessors) * ceil_div(tasks, pieces * kWarps) * (rows + kTaskRows);
    if (cost >= least) continue;
    least = cost;
    best = {int(strips), int(units), int(rows), int(pieces), int(tasks)};
  }
  return best;
}

// The work of one group of a warp.
struct Task {
  int64_t image;
  int row, column;  // its first, of those that were cut
  bool exists;
  __device__ __forceinline__ Task(const Cut& cut, int64_t images, int number, int columns, int group, int groups) {
    row = number / cut.units * cut.rows;
    const int strip = number % cut.units * groups + group;
    image = strip / cut.strips;
    column = strip % cut.strips * columns;
    exists = image < images;
    if (!exists) image = 0;
  }
};

// V channels of one place as they are stored, and as floats.
template <typename T, int V> struct Channels {
  static constexpr bool kPair = V == 2 && sizeof(T) == 2;  // in one register
  std::conditional_t<kPair, uint32_t, Vec<T, V>> stored;
  __device__ __forceinline__ static Channels read(const T* at) { return *reinterpret_cast<const Channels*>(at); }
  __device__ __forceinline__ static Channels of(const float (&v)[V]) {
    Channels made;
    if constexpr (kPair) {
      made.stored = round_pair<T>(v[0], v[1]);
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) made.stored.at[e] = from_float<T>(v[e]);
    }
    return made;
  }
  __device__ __forceinline__ void write(T* at) const { *reinterpret_cast<Channels*>(at) = *this; }
  __device__ __forceinline__ float operator[](int e) const {
    if constexpr (!kPair) {
      return to_float(stored.at[e]);
    } else if constexpr (std::is_same_v<T, bf16>) {
      return float_of_bits(e == 0 ? stored << 16 : stored & 0xffff0000u);
    } else {
      return to_float(fp16{static_cast<uint16_t>(e == 0 ? stored : stored >> 16)});
    }
  }
};

// A lane's place in the warp's ring, where a row is [columns][groups][kTile]: it copies one piece of every kAtOnce-th column.
template <class Tr> struct Place {
  using T = typename Tr::T;
  static constexpr int kPiece = Tr::kAligned ? 16 / int(sizeof(T)) : 1, kPieces = kTile / kPiece;  // elements; of a column
  static constexpr int kAtOnce = Tr::kLanes / kPieces;
  int column, channel;
  std::conditional_t<Tr::kAligned, Shared, T*> to;
  __device__ __forceinline__ Place(T* ring, int lane) {
    const int group = lane / Tr::kLanes, piece = lane % Tr::kLanes % kPieces * kPiece;
    column = lane % Tr::kLanes / kPieces;
    channel = blockIdx.x * kTile + piece;
    T* const first = ring + (column * Tr::kVector + group) * kTile + piece;
    if constexpr (Tr::kAligned) {
      to = shared_address(first);
    } else {
      to = first;
    }
  }
};

// A lane's part of a strip of kColumns columns from `first` on, one row at a time. The next row's address and which columns are in
// the image are values kept: worked out for each row, they took a third of the kernel's instructions.
template <class Tr, int kColumns> class Strip {
  using T = typename Tr::T;
  using P = Place<Tr>;
  static constexpr int kCopies = ceil_div(kColumns, P::kAtOnce);

 public:
  static constexpr int kRow = kColumns * Tr::kVector * kTile;  // elements, of all groups

  // from: pixel 0 of the row of the image that comes first.
  __device__ __forceinline__ Strip(const P& place, const T* from, int first, int width, const Depthwise& p, bool exists)
      : from_(from + int64_t(first + place.column) * p.channels + place.channel) {
    if (exists && place.channel < p.channels)
#pragma unroll
      for (int j = 0; j < kCopies; ++j) {
        const int column = place.column + j * P::kAtOnce;
        if (column < kColumns && unsigned(first + column) < unsigned(width)) wanted_ |= 1u << j;
      }
  }

  // The row, to the ring from element `to` on.
  __device__ __forceinline__ void copy(const P& place, int to, int channels) const {
    const T* from = from_;
#pragma unroll
    for (int j = 0; j < kCopies; ++j, from = pin_global(from + P::kAtOnce * channels)) {
      if (!(wanted_ >> j & 1)) continue;
      const int at = to + j * P::kAtOnce * Tr::kVector * kTile;
      if constexpr (Tr::kAligned) {
        copy_async(place.to + at * int(sizeof(T)), from, 16);
      } else {
        place.to[at] = *from;
      }
    }
  }
  __device__ __forceinline__ void next_row(int row) { from_ = pin_global(from_ + row); }

 private:
  const T* from_;
  unsigned wanted_ = 0;
};

// Rows [first, end), asked with one comparison.
struct Rows {
  int first;
  unsigned count;
  __device__ __forceinline__ Rows(int first, int end) : first(first), count(max(end - first, 0)) {}
  __device__ __forceinline__ bool have(int row) const { return unsigned(row - first) < count; }
};

// Which of kColumns columns from `first` on are in an image so wide, a bit each.
template <int kColumns> __device__ __forceinline__ unsigned columns_in(int first, int width) {
  unsigned in = 0;
#pragma unroll
  for (int t = 0; t < kColumns; ++t)
    if (unsigned(first + t) < unsigned(width)) in |= 1u << t;
  return in;
}

// Zeros where a column is not in the image: rarely taken, and so kept out of the way.
template <int kColumns, int V> __device__ __forceinline__ void zero_outside(float (&values)[kColumns][V], unsigned in) {
  if (in == (1u << kColumns) - 1) return;
#pragma unroll
  for (int t = 0; t < kColumns; ++t)
    if (!(in >> t & 1))
#pragma unroll
      for (int e = 0; e < V; ++e) values[t][e] = late_zero();
}

// Taps [tap][kTile] of the block's channels, read as they lie in memory.
template <class W> __device__ __forceinline__ void load_taps(const Depthwise& p, float* taps) {
  const int first = blockIdx.x * kTile, count = min(kTile, p.channels - first) * W::kTaps;
  for (int i = threadIdx.x; i < count; i += kThreads)
    taps[i % W::kTaps * kTile + i / W::kTaps] = load_float(p.weight, p.weight_dtype, int64_t(first) * W::kTaps + i);
}

// Of V channels, from the rows of a [3, channels]: scale * (x - mean) + bias. What is read as it is has the mean 0, the scale 1,
// the bias 0. For half types, which hold fewer digits than this loses, it is scale * x + shift.
template <typename T, int V> struct ChannelNorm {
  float mean[V], scale[V], bias[V];
  __device__ __forceinline__ ChannelNorm(const float* rows, int channels, int channel) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      mean[e] = rows ? rows[channel + e] : 0.f;
      scale[e] = rows ? rows[channels + channel + e] : 1.f;
      bias[e] = rows ? rows[2 * channels + channel + e] : 0.f;
      if constexpr (sizeof(T) == 2) bias[e] -= scale[e] * mean[e];
    }
  }
  __device__ __forceinline__ float operator()(float x, int e) const {
    return scale[e] * (sizeof(T) == 2 ? x : x - mean[e]) + bias[e];
  }
};

// Likewise of_y * (y - mean) + shift, with the norm's mean; and of_grad.
template <typename T, int V> struct ChannelCoefficients {
  float of_grad[V], of_y[V], shift[V], mean[V];
  __device__ __forceinline__ ChannelCoefficients(const float* rows, const ChannelNorm<T, V>& norm, int channels, int channel) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      of_grad[e] = rows[channel + e];
      of_y[e] = rows[channels + channel + e];
      shift[e] = rows[2 * channels + channel + e];
      mean[e] = norm.mean[e];
      if constexpr (sizeof(T) == 2) shift[e] -= of_y[e] * mean[e];
    }
  }
  __device__ __forceinline__ float operator()(float y, int e) const {
    return of_y[e] * (sizeof(T) == 2 ? y : y - mean[e]) + shift[e];
  }
};

struct Sum {
  double value;
  __device__ __forceinline__ void join(const Sum& other) { value += other.value; }
};

// Sums of pieces [pieces, numbers, channels]: the first two to sums [2, channels], the others to grad_weight [channels, numbers -
// 2]; null: not wanted. Grid: x = kFinishChannels each, y = numbers.
__global__ void __launch_bounds__(kFinishChannels* kRows)
    finish_sums_kernel(const float* partial, int pieces, int channels, float* sums, float* grad_weight) {
  EFFNET_DYNAMIC_SHARED(Sum, shared);
  const int lane = threadIdx.x % kFinishChannels, row = threadIdx.x / kFinishChannels, c = blockIdx.x * kFinishChannels + lane;
  const int number = blockIdx.y, numbers = gridDim.y;
  float* const to = number < 2 ? sums : grad_weight;
  if (!to) return;
  Sum sum{};
#pragma unroll 8
  for (int piece = row; c < channels && piece < pieces; piece += kRows)
    sum.value += partial[(int64_t(piece) * numbers + number) * channels + c];
  add_rows(shared, sum, row, lane);
  if (row > 0 || c >= channels) return;
  to[number < 2 ? int64_t(number) * channels + c : int64_t(c) * (numbers - 2) + number - 2] = float(sum.value);
}

}  // namespace effnet_fast::training
