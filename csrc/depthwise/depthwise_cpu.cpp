// Depthwise convolution, norm, activation and the squeeze's sums on the CPU, channels_last.
//
// A vector holds W channels. One step computes 7 neighbouring outputs of a row in registers, or 4, so that an input pixel is
// loaded once for all the outputs it meets in that row; the sums stay in a register for a row. For an output of W channels that
// is k*k multiply-adds, about k*k * 16/35 loads from L1 (5x5, stride 1), 14 instructions of SiLU with a division, one store. Memory
// sees x and y once: 3x3 is bound by it where the image is large, 5x5 and small images by the multiply-adds.
//
// An image is cut into bands of rows, one for each piece of the squeeze. In a band the rows that hold kTile bytes of x, for one
// vector of channels, are used up before the next vector's: the k rows under the kernel stay in L1. A thread owns whole bands;
// where those do not divide evenly among the threads, groups of vectors of channels are shared too. Neither changes a result.
// What is computed next is fetched meanwhile, in the order of its addresses: the tile below or, where a tile is the whole band, the
// next few vectors of the same rows.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "../common/norm.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/simd.h"
#include "params.h"

namespace effnet_fast::depthwise {
namespace {

constexpr int kColumns = 4, kMostColumns = 7;
constexpr int kTile = 16 << 10;
constexpr int kVectorsAhead = 4;     // that are fetched together: 256 neighbouring bytes of a pixel of floats
constexpr int kRowsPerBand = 7;      // where no sums are asked for
constexpr int64_t kGrain = 1 << 19;  // multiply-adds worth a thread: waking a sleeping one costs about 30 us
constexpr int kActivationCost = 16;  // of an output's norm, activation and store, in multiply-adds

// W channels of the weight and the folded norm.
template <int W, int K> struct Block {
  float weight[K * K][W];
  float scale[W], shift[W];
};

template <int W> EFFNET_INLINE int block_start(int channel, int channels) { return std::min(channel, channels - W); }

// Blocks overlap where W does not divide the channels: the last one computes some of its neighbour's again.
template <int W, int K> EFFNET_INLINE void pack(const ForwardParams& p, int begin, int end, Block<W, K>* blocks) {
  const Norm norm{p.norm_weight, p.norm_bias, p.norm_mean, p.norm_var, p.eps, p.norm_dtype};
  for (int channel = begin; channel < end; channel += W) {
    Block<W, K>& block = *blocks++;
    const int first = block_start<W>(channel, p.channels);
    fold_norm(norm, first, W, block.scale, block.shift);
    with_dtype(p.weight_dtype, [&](auto type) {
      const auto* weight = static_cast<const decltype(type)*>(p.weight) + int64_t(first) * K * K;
      for (int lane = 0; lane < W; ++lane)
        for (int tap = 0; tap < K * K; ++tap) block.weight[tap][lane] = to_float(weight[lane * K * K + tap]);
    });
  }
}

template <int W, int N> EFFNET_INLINE void activate_all(Activation activation, simd::Float<W>* v) {
  const auto each = [&](Activation constant) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) v[i] = simd::activate<W>(constant, v[i]);
  };
  switch (activation) {
    case Activation::silu: return each(Activation::silu);
    case Activation::relu: return each(Activation::relu);
    case Activation::relu6: return each(Activation::relu6);
    default: return;
  }
}

// Adds to v the taps of C outputs whose windows start at input column `column`; kInside if none of them leaves the image
// sideways. x is column 0 of the first row under the kernel's rows [tap_row, tap_row + tap_rows), which are inside the image.
template <int W, int K, int S, int C, bool kInside, typename T>
EFFNET_INLINE void add_taps(const ForwardParams& p, const Block<W, K>& block, const T* x, int tap_row, int tap_rows, int column,
                            simd::Float<W>* v) {
  using namespace simd;
  for (int row = 0; row < tap_rows; ++row, x += p.x_row) {
    const T* pixels = x + column * p.x_pixel;
    Float<W> weight[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) weight[k] = load<W>(block.weight[(tap_row + row) * K + k]);
#pragma GCC unroll 20
    for (int q = 0; q < (C - 1) * S + K; ++q) {
      if (!kInside && unsigned(column + q) >= unsigned(p.width)) continue;
      const Float<W> pixel = load<W>(pixels + q * p.x_pixel);
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i)
        if (q >= i * S && q < i * S + K) v[i] += pixel * weight[q - i * S];
    }
  }
}

// Fetches some channels of one pixel of x after the other into a cache, whole pixels at a time.
struct Ahead {
  uintptr_t at;
  int64_t lines, pixel;  // of those channels, kRun where pixels follow one another without a gap, 0: fetches nothing; bytes
  int64_t owed = 0;      // lines that were asked for and not fetched
  static constexpr int64_t kRun = INT64_MAX;
  template <int N, int kLevel> EFFNET_INLINE void fetch() {
    if (lines == kRun) {
#pragma GCC unroll 32
      for (int i = 0; i < N; ++i) __builtin_prefetch(reinterpret_cast<const void*>(at + i * 64), 0, kLevel);
      at += N * 64;
    } else if (lines) {
      for (owed += N; owed >= lines; owed -= lines, at += pixel)
        for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(reinterpret_cast<const void*>(at + i * 64), 0, kLevel);
    }
  }
};

template <typename T> inline Ahead ahead_from(const ForwardParams& p, int64_t image, int row, int begin, int end) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p.x) + (image * p.x_image + row * p.x_row + begin) * sizeof(T);
  const int64_t bytes = int64_t(end - begin) * sizeof(T), pixel = p.x_pixel * sizeof(T);
  return {at, bytes == pixel ? Ahead::kRun : (bytes + 63) / 64, pixel};
}

// Whether what is left of a row is cut into steps of kMostColumns outputs from here on. A row of 18 or more is cut without rest.
EFFNET_INLINE bool takes_most(int left) { return left <= 0 || left % 7 == 0 || left == 5 || left == 6; }

// Output rows [first, last) of W channels from `channel` on. Fetches as many bytes `ahead` as new ones are read. With stride 2 that
// is four times what is made, and would drive out of L1 what is in use: it goes to L2.
template <int W, int K, int S, typename T> EFFNET_INLINE void rows(const ForwardParams& p, int64_t image, const Block<W, K>& block,
                                                                   float* sums, int channel, int first, int last, Ahead& ahead) {
  using namespace simd;
  for (int row = first; row < last; ++row) {
    const int start = row * S - p.pad_top, from = std::max(start, 0), to = std::min(start + K, p.height);
    const T* x = static_cast<const T*>(p.x) + image * p.x_image + from * p.x_row + channel;
    T* y = static_cast<T*>(p.y) + (image * p.out_height + row) * p.out_width * p.channels + channel;
    const Float<W> scale = load<W>(block.scale), shift = load<W>(block.shift);
    Float<W> sum{};
    const auto step = [&](int out, auto columns) __attribute__((always_inline)) {
      constexpr int C = decltype(columns)::value;
      const int column = out * S - p.pad_left;
      ahead.fetch<(C * S * S * W * int(sizeof(T)) + 63) / 64, S == 1 ? 3 : 2>();
      if (row + 1 < last) {  // where the next row is stored
        for (int i = 0; i < C; ++i) __builtin_prefetch(y + int64_t(p.out_width + i) * p.channels, 1, 3);
      }
      Float<W> v[C] = {};
      if (column >= 0 && column + (C - 1) * S + K <= p.width) {
        add_taps<W, K, S, C, true>(p, block, x, from - start, to - from, column, v);
      } else {
        add_taps<W, K, S, C, false>(p, block, x, from - start, to - from, column, v);
      }
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) v[i] = v[i] * scale + shift;
      activate_all<W, C>(p.activation, v);
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i, y += p.channels) {
        if (out + i >= p.out_width) break;
        store<W>(y, v[i]);
        if constexpr (!std::is_same_v<T, float>) v[i] = load<W>(y);
        sum += v[i];
      }
    };
    int out = 0;
    for (; !takes_most(p.out_width - out); out += kColumns) step(out, std::integral_constant<int, kColumns>());
    for (; out < p.out_width; out += kMostColumns) step(out, std::integral_constant<int, kMostColumns>());
    store<W>(sums, load<W>(sums) + sum);
  }
}

// `more`: the same thread goes on with the band below, or the next image's first.
template <int W, int K, int S, typename T>
EFFNET_INLINE void band(const ForwardParams& p, const Band& b, bool more, const Block<W, K>* blocks, float* sums) {
  const int tile = std::max(0, kTile / int(W * sizeof(T)) / p.width - K) / S + 1;
  const int count = (b.last_channel - b.first_channel + W - 1) / W, together = tile < b.last - b.first ? count : kVectorsAhead;
  const auto channel = [&](int i) { return std::min(b.first_channel + i * W, b.last_channel); };
  const auto start = [&](int i) { return block_start<W>(b.first_channel + i * W, p.channels); };
  std::fill_n(sums, count * W, 0.f);
  for (int i = 0; b.adds && i < count; ++i) memcpy(sums + i * W, b.partial + start(i), W * sizeof(float));
  for (int row = b.first; row < b.last; row += tile) {
    const int last = std::min(row + tile, b.last), below = (last - 1) * S - p.pad_top + K;
    for (int i = 0; i < count; i += together) {
      const int next = i + together;
      Ahead ahead{};
      if (next < count)
        ahead = ahead_from<T>(p, b.image, std::max(row * S - p.pad_top, 0), channel(next), channel(next + together));
      else if (last < b.last || (more && last < p.out_height))
        ahead = ahead_from<T>(p, b.image, below, b.first_channel, channel(together));
      else if (more)
        ahead = ahead_from<T>(p, b.image + 1, 0, b.first_channel, channel(together));
      for (int j = i; j < std::min(next, count); ++j)
        rows<W, K, S, T>(p, b.image, blocks[j], sums + j * W, start(j), row, last, ahead);
    }
  }
  for (int i = 0; b.partial && i < count; ++i) memcpy(b.partial + start(i), sums + i * W, W * sizeof(float));
}

// A range of bands, numbered through the images, over one group of channels.
struct Task {
  const ForwardParams* params;
  const Band* band;  // the only one, or null
  int bands;         // of an image
  int64_t first, last;
  int begin, end;  // channels; the first is a multiple of the vector's width
  void* packed;    // where they are packed to, and nothing else is done; or null
};

template <int W> EFFNET_INLINE void pack_task(const Task& t) {
  const ForwardParams& p = *t.params;
  if (p.kernel == 3) return pack<W, 3>(p, t.begin, t.end, static_cast<Block<W, 3>*>(t.packed));
  pack<W, 5>(p, t.begin, t.end, static_cast<Block<W, 5>*>(t.packed));
}

template <int W, int K, int S, typename T> EFFNET_INLINE void run_task(const Task& t) {
  const ForwardParams& p = *t.params;
  const size_t count = (t.end - t.begin + W - 1) / W, block = sizeof(Block<W, K>) / sizeof(float);
  float* sums = scratch<Task>(count * (W + (p.packed ? 0 : block)));
  const Block<W, K>* blocks;
  if (p.packed) {
    blocks = static_cast<const Block<W, K>*>(p.packed) + t.begin / W;
  } else {
    auto* made = reinterpret_cast<Block<W, K>*>(sums + count * W);
    pack<W, K>(p, t.begin, t.end, made);
    blocks = made;
  }
  if (t.band) return band<W, K, S, T>(p, *t.band, false, blocks, sums);
  for (int64_t i = t.first; i < t.last; ++i) {
    const int64_t image = i / t.bands, at = i % t.bands;
    const int first = int(at * p.out_height / t.bands), last = int((at + 1) * p.out_height / t.bands);
    const Band b{image, first, last, t.begin, t.end, p.pieces ? p.partial + i * p.channels : nullptr, false};
    band<W, K, S, T>(p, b, i + 1 < t.last, blocks, sums);
  }
}

template <int W, typename T> EFFNET_INLINE void run_kernel(const Task& t) {
  const ForwardParams& p = *t.params;
  if (p.kernel == 3) return p.stride == 1 ? run_task<W, 3, 1, T>(t) : run_task<W, 3, 2, T>(t);
  return p.stride == 1 ? run_task<W, 5, 1, T>(t) : run_task<W, 5, 2, T>(t);
}

template <int W> EFFNET_INLINE void run_any(const Task& t) {
  if (t.packed) return pack_task<W>(t);
  switch (t.params->dtype) {
    case DType::fp32: return run_kernel<W, float>(t);
    case DType::bf16: return run_kernel<W, bf16>(t);
    case DType::fp16: return run_kernel<W, fp16>(t);
  }
}

EFFNET_PER_WIDTH(run, run_any)

}  // namespace

size_t packed_bytes(const ForwardParams& p) {
  const int width = simd::width_for(p.channels);
  return size_t((p.channels + width - 1) / width) * width * (p.kernel * p.kernel + 2) * sizeof(float);
}

void pack_cpu(const ForwardParams& p, void* packed) {
  run(Task{&p, nullptr, 0, 0, 0, 0, p.channels, packed}, simd::width_for(p.channels));
}

void band_cpu(const ForwardParams& p, const Band& band) {
  run(Task{&p, &band, 0, 0, 0, band.first_channel, band.last_channel, nullptr}, simd::width_for(p.channels));
}

void forward_cpu(const ForwardParams& p) {
  const int bands = p.pieces ? p.pieces : std::max(1, p.out_height / kRowsPerBand);
  const int64_t items = p.batch * bands, threads = thread_count();
  // Vectors of channels, the last with what is left over. Small images are shared out by groups of them, so that no two threads
  // pack the same weights; of larger ones there are as many groups as make the tasks divide among the threads.
  const int width = simd::width_for(p.channels), vectors = p.channels / width;
  const int64_t most = items < 4 * threads ? threads : items < 8 * threads ? threads / std::gcd(items, threads) : 1;
  const int64_t groups = std::min<int64_t>(vectors, most);
  const int64_t work =
      int64_t(p.out_height) * p.out_width * p.channels / (bands * groups) * (p.kernel * p.kernel + kActivationCost);
  parallel_for(groups * items, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin / items; group * items < end; ++group) {
      const auto channel = [&](int64_t g) { return g == groups ? p.channels : int(g * vectors / groups) * width; };
      const int64_t first = std::max<int64_t>(begin - group * items, 0), last = std::min(end - group * items, items);
      run(Task{&p, nullptr, bands, first, last, channel(group), channel(group + 1), nullptr}, width);
    }
  });
}

}  // namespace effnet_fast::depthwise
