// The squeeze-excite gate on the CPU.
//
// Few images: a row of an FC is a dot product along its inner dimension, vectorised, an image at a time; W rows are summed up
// together. The weights bind, read once an image: 2 * channels * reduced of them, from L2 or L3.
// Otherwise: up to W images are the lanes of one vector. Squeeze and hidden layer are kept transposed, [channels][W] and
// [reduced][W]; an FC multiplies one weight, broadcast, with the lanes of one input, kRows rows at a time so that an input is
// loaded once for kRows multiply-adds. Those bind: channels * reduced of W lanes for each FC. The weights are read once for W
// images.
//
// Threads share the rows of each FC, or whole groups of images when there are enough of those to go round.
#include <algorithm>
#include <type_traits>

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/simd.h"
#include "params.h"

namespace effnet_fast::squeeze_excite {
namespace {

constexpr int kRows = 8;             // rows of an FC computed together, in as many accumulators
constexpr int kChunk = 16;           // products added up before they join a row's total: a longer chain rounds worse than oneDNN
constexpr int64_t kGrain = 1 << 19;  // weights worth a thread, for one image: waking a sleeping one costs about 30 us
constexpr int kLaneCost = 4;         // a weight times a vector of images, in weights of one image

// One FC: output[row] = activation(bias[row] + sum_i weight[row][i] * input[i]).
struct Layer {
  const void* weight;  // [rows, inner]
  const void* bias;    // [rows] or null
  int inner;
  Activation activation;
};

// --- one image -------------------------------------------------------------------------------------------------------------

template <int W, typename T> EFFNET_INLINE float dot(const T* a, const float* b, int count) {
  using namespace simd;
  int i = 0;
  float result = 0.f;
  if (count >= W) {
    Float<W> sums[4] = {};
    for (; i + 4 * W <= count; i += 4 * W)
      for (int k = 0; k < 4; ++k) sums[k] += load<W>(a + i + k * W) * load<W>(b + i + k * W);
    for (; i + W <= count; i += W) sums[0] += load<W>(a + i) * load<W>(b + i);
    result = sum<W>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  if constexpr (W > 4) {
    result += dot<W / 2>(a + i, b + i, count - i);
  } else {
    for (; i < count; ++i) result += to_float(a[i]) * b[i];
  }
  return result;
}

// The products of a row with the input, to be summed up; count >= W. `tail` is the last W inputs, but those that whole vectors of
// the row have met are zero.
template <int W, typename T> EFFNET_INLINE simd::Float<W> products(const T* a, const float* b, simd::Float<W> tail, int count) {
  using namespace simd;
  Float<W> sums[4] = {};
  int i = 0;
  for (; i + 4 * W <= count; i += 4 * W)
    for (int k = 0; k < 4; ++k) sums[k] += load<W>(a + i + k * W) * load<W>(b + i + k * W);
  for (; i + W <= count; i += W) sums[0] += load<W>(a + i) * load<W>(b + i);
  sums[1] += load<W>(a + count - W) * tail;
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <int W, typename T>
EFFNET_INLINE void rows_of_image(const Layer& l, const float* input, float* output, int first, int last) {
  using namespace simd;
  const T* weight = static_cast<const T*>(l.weight);
  const T* bias = static_cast<const T*>(l.bias);
  Float<W> tail{};
  for (int i = l.inner / W * W; i < l.inner; ++i) tail[W - l.inner + i] = input[i];
  for (int base = first; base < last; base += W) {
    const int rows = std::min(W, last - base);
    float sums[W] = {}, shift[W] = {};
    for (int k = 0; bias && k < rows; ++k) shift[k] = to_float(bias[base + k]);
    if (l.inner >= W) {
      Float<W> vectors[W] = {};
      for (int k = 0; k < rows; ++k) vectors[k] = products<W>(weight + int64_t(base + k) * l.inner, input, tail, l.inner);
      store<W>(sums, sum_each<W>(vectors));
    } else {
      for (int k = 0; k < rows; ++k) sums[k] = dot<W>(weight + int64_t(base + k) * l.inner, input, l.inner);
    }
    store<W>(sums, activate<W>(l.activation, load<W>(sums) + load<W>(shift)));
    memcpy(output + base, sums, rows * sizeof(float));
  }
}

template <int W> EFFNET_INLINE void squeeze_of_image(const GateParams& p, int64_t image, int first, int last, float* output) {
  using namespace simd;
  const float* partial = p.partial + image * p.pieces * p.channels;
  int c = first;
  for (; c + W <= last; c += W) {
    Float<W> total = load<W>(partial + c);
    for (int piece = 1; piece < p.pieces; ++piece) total += load<W>(partial + int64_t(piece) * p.channels + c);
    store<W>(output + c, total / p.count);
  }
  for (; c < last; ++c) {
    float total = partial[c];
    for (int piece = 1; piece < p.pieces; ++piece) total += partial[int64_t(piece) * p.channels + c];
    output[c] = total / p.count;
  }
}

// --- W images, one a lane --------------------------------------------------------------------------------------------------

template <int W, int kCount, typename T>
EFFNET_INLINE void rows_of_lanes(const Layer& l, const float* input, int row, float (*output)[W]) {
  using namespace simd;
  const T* weight = static_cast<const T*>(l.weight) + int64_t(row) * l.inner;
  const T* bias = static_cast<const T*>(l.bias);
  Float<W> totals[kCount] = {};
  for (int start = 0; start < l.inner; start += kChunk) {
    const int count = std::min(kChunk, l.inner - start);
    const float* rows[kCount];
    float converted[std::is_same_v<T, float> ? 1 : kCount][kChunk];
    for (int k = 0; k < kCount; ++k) {
      const T* source = weight + int64_t(k) * l.inner + start;
      if constexpr (std::is_same_v<T, float>) {
        rows[k] = source;
      } else {
        int i = 0;
        for (; i + W <= count; i += W) store<W>(converted[k] + i, load<W>(source + i));
        for (; i < count; ++i) converted[k][i] = to_float(source[i]);
        rows[k] = converted[k];
      }
    }
    Float<W> sums[kCount] = {};
    for (int i = 0; i < count; ++i) {
      const Float<W> lanes = load<W>(input + int64_t(start + i) * W);
      for (int k = 0; k < kCount; ++k) sums[k] += rows[k][i] * lanes;
    }
    for (int k = 0; k < kCount; ++k) totals[k] += sums[k];
  }
  for (int k = 0; k < kCount; ++k) {
    store<W>(output[k], activate<W>(l.activation, totals[k] + (bias ? to_float(bias[row + k]) : 0.f)));
  }
}

template <int W, typename T>
EFFNET_INLINE void rows_of_lanes(const Layer& l, const float* input, int row, int count, float (*output)[W]) {
  if (count == kRows) return rows_of_lanes<W, kRows, T>(l, input, row, output);
  for (int k = 0; k < count; ++k) rows_of_lanes<W, 1, T>(l, input, row + k, output + k);
}

template <int W>
EFFNET_INLINE void squeeze_of_lanes(const GateParams& p, int64_t image, int images, int first, int last, float* output) {
  using namespace simd;
  for (int c = first; c < last; c += W) {
    const int count = std::min(W, last - c);
    for (int lane = 0; lane < W; ++lane) {
      float means[W] = {};
      if (lane < images) {
        const float* partial = p.partial + (image + lane) * p.pieces * p.channels + c;
        if (count == W) {
          Float<W> total = load<W>(partial);
          for (int piece = 1; piece < p.pieces; ++piece) total += load<W>(partial + int64_t(piece) * p.channels);
          store<W>(means, total / p.count);
        } else {
          for (int k = 0; k < count; ++k) {
            float total = partial[k];
            for (int piece = 1; piece < p.pieces; ++piece) total += partial[int64_t(piece) * p.channels + k];
            means[k] = total / p.count;
          }
        }
      }
      for (int k = 0; k < count; ++k) output[int64_t(c + k) * W + lane] = means[k];
    }
  }
}

// --- steps, each a range of rows that any thread may compute ---------------------------------------------------------------------

enum class Step { squeeze, reduce, expand };

struct Task {
  const GateParams* params;
  Step step;
  bool by_lanes;  // images are lanes; else there is one
  int64_t image;  // the first
  int images;
  int first, last;  // rows: channels of the squeeze and the expand FC, hidden units of the reduce FC
  float* squeezed;  // [channels] or [channels][W]
  float* hidden;    // [reduced] or [reduced][W]
};

template <int W, typename T> EFFNET_INLINE void run_layer(const Task& t, const Layer& l) {
  const GateParams& p = *t.params;
  const bool last_layer = t.step == Step::expand;
  const float* input = last_layer ? t.hidden : t.squeezed;
  if (!t.by_lanes) return rows_of_image<W, T>(l, input, last_layer ? p.gate + t.image * p.channels : t.hidden, t.first, t.last);
  for (int row = t.first; row < t.last; row += kRows) {
    const int count = std::min(kRows, t.last - row);
    alignas(64) float tile[kRows][W];
    rows_of_lanes<W, T>(l, input, row, count, tile);
    if (!last_layer) {
      memcpy(t.hidden + int64_t(row) * W, tile, sizeof(tile[0]) * count);
      continue;
    }
    for (int lane = 0; lane < t.images; ++lane)
      for (int k = 0; k < count; ++k) p.gate[(t.image + lane) * p.channels + row + k] = tile[k][lane];
  }
}

template <int W> EFFNET_INLINE void run_step(const Task& t) {
  const GateParams& p = *t.params;
  if (t.step == Step::squeeze) {
    if (t.by_lanes) return squeeze_of_lanes<W>(p, t.image, t.images, t.first, t.last, t.squeezed);
    return squeeze_of_image<W>(p, t.image, t.first, t.last, t.squeezed);
  }
  const Layer l = t.step == Step::reduce ? Layer{p.reduce_weight, p.reduce_bias, p.channels, p.activation}
                                         : Layer{p.expand_weight, p.expand_bias, p.reduced, Activation::sigmoid};
  switch (p.dtype) {
    case DType::fp32: return run_layer<W, float>(t, l);
    case DType::bf16: return run_layer<W, bf16>(t, l);
    case DType::fp16: return run_layer<W, fp16>(t, l);
  }
}

EFFNET_PER_ISA(run, (const Task& t), run_step, (t))

void run_group(const GateParams& p, bool by_lanes, int64_t image, int images) {
  const int width = by_lanes ? simd::width() : 1;
  float* squeezed = scratch<Task>(size_t(p.channels + p.reduced) * width);
  Task task{&p, Step::squeeze, by_lanes, image, images, 0, 0, squeezed, squeezed + int64_t(p.channels) * width};
  for (const Step step : {Step::squeeze, Step::reduce, Step::expand}) {
    const int rows = step == Step::reduce ? p.reduced : p.channels;
    const int inner = step == Step::squeeze ? p.pieces : step == Step::reduce ? p.channels : p.reduced;
    const int64_t grain = kGrain / (int64_t(kRows) * inner * (by_lanes ? kLaneCost : 1)) + 1;
    parallel_for((rows + kRows - 1) / kRows, grain, [&, step](int64_t begin, int64_t end) {
      Task mine = task;
      mine.step = step;
      mine.first = int(begin * kRows);
      mine.last = int(std::min<int64_t>(end * kRows, rows));
      run(mine);
    });
  }
}

}  // namespace

void gate_cpu(const GateParams& p) {
  const bool by_lanes = p.batch > simd::width() / 4;  // as many images one at a time cost what a vector of them does
  const int64_t group = by_lanes ? std::min<int64_t>(simd::width(), p.batch) : 1, groups = (p.batch + group - 1) / group;
  const auto run_groups = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) run_group(p, by_lanes, g * group, int(std::min(group, p.batch - g * group)));
  };
  if (groups < thread_count()) return run_groups(0, groups);  // the threads share each group's rows
  const int64_t weights = 2 * int64_t(p.channels) * p.reduced * (by_lanes ? kLaneCost : 1);
  parallel_for(groups, kGrain / weights + 1, run_groups);
}

}  // namespace effnet_fast::squeeze_excite
