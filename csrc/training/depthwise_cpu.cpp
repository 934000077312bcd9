// Training's depthwise convolution on the CPU: forward with statistics, and both gradients in one pass.
//
// A thread takes on an image and a group of blocks of W channels at a time, as many as leave their rings in L2, and goes down its
// rows. A ring holds the last K rows of one block, activated, with zeros beside them: each element of x is activated once, and no
// tap asks where the image ends. Forward: a row enters the rings, a row of y is computed seven outputs at a time in registers.
// Backward: a row of the gradient of y enters a ring of its own. Then the taps' gradients gain that row, K sums in registers along
// it for each row of taps, and those rows of x of which all is known now get their gradient: with stride S in S phases, each a
// convolution of the ring with every S-th tap.
//
// For an output of W channels: k*k multiply-adds forward, twice that backward, and SiLU with its slope for each input. Every tensor
// is read or written once. The multiply-adds bind; 3x3 on large images is bound by memory.
#include "../common/scratch.h"
#include "elements.h"

namespace effnet_fast::training {
namespace {

constexpr int64_t kRings = 64 << 10;  // floats of a group's rings
constexpr int64_t kGrain = 1 << 18;   // multiply-adds worth a thread

struct Task {
  const Depthwise* p;
  const Stats* stats;          // forward
  const Gradients* gradients;  // or backward
  int group;                   // blocks in a group, the last with what is left over
  Part* part;                  // of the units, groups within images: [2, lanes] of y's values and squares, or of x's, then taps'
};

// Sizes of the rings of a block, in vectors.
struct Rings {
  int columns, outputs;  // of x's and of the gradient's, whose first output comes after `kernel` zeros
  explicit Rings(const Depthwise& p)
      : columns(std::max((p.out_width - 1) * p.stride + p.kernel, p.pad_left + p.width)),
        outputs(p.kernel + std::max(p.out_width, (p.width - 1 + p.pad_left) / p.stride + 1)) {}
};

template <int W, int K> EFFNET_INLINE void load_taps(const Depthwise& p, int channel, float (*taps)[W]) {
  with_dtype(p.weight_dtype, [&](auto type) {
    const auto* weight = static_cast<const decltype(type)*>(p.weight) + int64_t(channel) * K * K;
    for (int lane = 0; lane < W; ++lane)
      for (int tap = 0; tap < K * K; ++tap) taps[tap][lane] = to_float(weight[lane * K * K + tap]);
  });
}

// One row of one block enters its ring at column pad_left; with slopes if there is room for them.
template <int W> EFFNET_INLINE void enter_row(const Depthwise& p, int64_t image, int row, int channel, float* ring, float* slopes) {
  using namespace simd;
  const int64_t at = (image * p.height + row) * p.width * p.channels + channel, ahead = int64_t(p.width) * p.channels;
  const int64_t bytes = size_of(p.dtype);
  const bool more = row + 1 < p.height;
  const auto* next = static_cast<const char*>(p.read.x) + (at + ahead) * bytes;
  ring += p.pad_left * W;
  const auto each = [&](auto&& body) __attribute__((always_inline)) {
    for (int column = 0; column < p.width; ++column, ring += W) {
      if (more) __builtin_prefetch(next + int64_t(column) * p.channels * bytes, 0, 2);
      body(load_any<W>(p.read.x, at + int64_t(column) * p.channels, p.dtype));
    }
  };
  if (!p.read.norm) return each([&](Float<W> x) __attribute__((always_inline)) { store<W>(ring, x); });
  const Vectors<W> norm(p.read.norm, p.channels, channel);
  if (!slopes)
    return each([&](Float<W> x) __attribute__((always_inline)) { store<W>(ring, activate<W>(p.read.activation, norm(x))); });
  slopes += p.pad_left * W;
  each([&](Float<W> x) __attribute__((always_inline)) {
    const Activated<W> made = activate_with_slope<W>(p.read.activation, norm(x));
    store<W>(ring, made.value);
    store<W>(slopes, made.slope);
    slopes += W;
  });
}

// v[i] += the row of taps of C outputs, `S` columns apart.
template <int W, int K, int S, int C> EFFNET_INLINE void add_taps(const float* row, const float (*taps)[W], simd::Float<W>* v) {
  using namespace simd;
  Float<W> weight[K];
#pragma GCC unroll 5
  for (int k = 0; k < K; ++k) weight[k] = load<W>(taps[k]);
#pragma GCC unroll 20
  for (int q = 0; q < (C - 1) * S + K; ++q) {
    const Float<W> pixel = load<W>(row + q * W);
#pragma GCC unroll 7
    for (int i = 0; i < C; ++i)
      if (q >= i * S && q < i * S + K) v[i] += pixel * weight[q - i * S];
  }
}

// Calls step(first, number) over [first, last) in runs of 7, 4 and 1, the numbers being constants.
template <typename F> EFFNET_INLINE void in_runs(int first, int last, const F& step) {
  for (; first + 7 <= last; first += 7) step(first, std::integral_constant<int, 7>());
  for (; first + 4 <= last; first += 4) step(first, std::integral_constant<int, 4>());
  for (; first < last; ++first) step(first, std::integral_constant<int, 1>());
}

template <int W, int K, int S> EFFNET_INLINE void run_forward(const Task& t) {
  using namespace simd;
  const Depthwise& p = *t.p;
  const Rings size(p);
  const int blocks = blocks_of(p.channels, W), groups = (blocks - 1) / t.group + 1;
  const int64_t ring_floats = int64_t(K) * size.columns * W, taps_floats = K * K * W;
  float* rings = scratch<Task>(t.group * (ring_floats + taps_floats));
  float* taps = rings + t.group * ring_floats;
  std::fill_n(rings, t.group * ring_floats, 0.f);
  for (int64_t unit = t.part->first; unit < t.part->last; ++unit) {
    const int64_t image = unit / groups;
    const int begin = int(unit % groups) * t.group, count = std::min(t.group, blocks - begin);
    for (int j = 0; j < count; ++j)
      load_taps<W, K>(p, block_start<W>(begin + j, p.channels), reinterpret_cast<float (*)[W]>(taps + j * taps_floats));
    int entered = 0;
    for (int out = 0; out < p.out_height; ++out) {
      const int top = out * S - p.pad_top, from = std::max(top, 0), to = std::min(top + K, p.height);
      for (int j = 0; j < count; ++j) {
        const int channel = block_start<W>(begin + j, p.channels);
        float* ring = rings + j * ring_floats;
        for (int row = std::max(entered, from); row < to; ++row)
          enter_row<W>(p, image, row, channel, ring + row % K * size.columns * W, nullptr);
        const auto* weight = reinterpret_cast<const float (*)[W]>(taps + j * taps_floats);
        Totals<W> totals;
        int64_t y = ((image * p.out_height + out) * p.out_width) * p.channels + channel;
        const auto step = [&](int column, auto columns) __attribute__((always_inline)) {
          constexpr int C = decltype(columns)::value;
          Float<W> v[C] = {};
          for (int row = from; row < to; ++row)
            add_taps<W, K, S, C>(ring + (row % K * size.columns + column * S) * W, weight + (row - top) * K, v);
#pragma GCC unroll 7
          for (int i = 0; i < C; ++i, y += p.channels) {
            totals.add(store_any<W>(t.stats->y, y, p.dtype, v[i]));
          }
        };
        in_runs(0, p.out_width, step);
        add_to<W>(t.part->sums.data() + (begin + j) * W, totals.sum);
        add_to<W>(t.part->sums.data() + (blocks + begin + j) * W, totals.squares);
      }
      entered = std::max(entered, to);
    }
  }
}

// The taps of phase P of a stride S, from the last to the first: what convolves the gradient.
template <int K, int S, int P> constexpr int kTaps = (K - P + S - 1) / S;
template <int W, int K, int S, int P> EFFNET_INLINE void reverse_taps(const float (*taps)[W], float (*reversed)[W]) {
  constexpr int T = kTaps<K, S, P>;
  for (int row = 0; row < K; ++row)
    for (int k = 0; k < T; ++k) memcpy(reversed[row * T + k], taps[row * K + P + S * (T - 1 - k)], W * sizeof(float));
}

// What a thread works on in the backward of one block of one image.
template <int W> struct Block {
  int channel, lane;
  float *ring, *slopes, *gradients;
  float (*taps)[W];  // reversed, phase by phase
  float (*grad_taps)[W];
};

// grad_taps += the gradient's row `out` with the rows of x that its windows see.
template <int W, int K, int S>
EFFNET_INLINE void add_weight(const Depthwise& p, const Rings& size, const Block<W>& b, int out, int from, int to) {
  using namespace simd;
  const float* gradients = b.gradients + (out % K * size.outputs + K) * W;
  for (int row = from; row < to; ++row) {
    const float* x = b.ring + row % K * size.columns * W;
    Float<W> total[2][K] = {};
    int column = 0;
    for (; column + 4 <= p.out_width; column += 4) {
      Float<W> g[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) g[i] = load<W>(gradients + (column + i) * W);
#pragma GCC unroll 20
      for (int q = 0; q < 3 * S + K; ++q) {
        const Float<W> pixel = load<W>(x + (column * S + q) * W);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          if (q >= i * S && q < i * S + K) total[i % 2][q - i * S] += pixel * g[i];
      }
    }
    for (; column < p.out_width; ++column) {
      const Float<W> g = load<W>(gradients + column * W);
#pragma GCC unroll 5
      for (int k = 0; k < K; ++k) total[0][k] += load<W>(x + (column * S + k) * W) * g;
    }
    float (*taps)[W] = b.grad_taps + (row - out * S + p.pad_top) * K;
#pragma GCC unroll 5
    for (int k = 0; k < K; ++k) store<W>(taps[k], load<W>(taps[k]) + (total[0][k] + total[1][k]));
  }
}

// The columns of phase P of row `row` of the gradient of x.
template <int W, int K, int S, int P>
EFFNET_INLINE void write_phase(const Task& t, const Rings& size, const Block<W>& b, int64_t image, int row) {
  using namespace simd;
  constexpr int T = kTaps<K, S, P>;
  const Depthwise& p = *t.p;
  const Gradients& made = *t.gradients;
  const float (*taps)[W] = b.taps + (P == 0 ? 0 : K * kTaps<K, S, 0>);
  const int64_t at = (image * p.height + row) * p.width * p.channels + b.channel;
  const float* slopes = b.slopes + (row % K * size.columns + p.pad_left) * W;
  const Float<W> mean = p.read.norm ? load<W>(p.read.norm + b.channel) : Float<W>{};
  Float<W> sum{}, products{};
  const int first = std::max(0, (p.pad_left - P + S - 1) / S), last = (p.width - 1 + p.pad_left - P + S) / S;
  in_runs(first, last, [&](int m, auto run) __attribute__((always_inline)) {
    constexpr int C = decltype(run)::value;
    Float<W> v[C] = {}, of_run{}, products_of_run{};
    for (int tap = (row + p.pad_top) % S; tap < K; tap += S) {
      const int out = (row + p.pad_top - tap) / S;
      if (row + p.pad_top < tap || out >= p.out_height) continue;
      add_taps<W, T, 1, C>(b.gradients + (out % K * size.outputs + K + m - (T - 1)) * W, taps + tap * T, v);
    }
#pragma GCC unroll 7
    for (int i = 0; i < C; ++i) {
      const int column = S * (m + i) + P - p.pad_left;
      const int64_t place = at + int64_t(column) * p.channels;
      if (p.read.norm) {
        v[i] *= load<W>(slopes + column * W);
        of_run += v[i];
        products_of_run += v[i] * (load_any<W>(p.read.x, place, p.dtype) - mean);
      }
      if (made.residual) v[i] += load_any<W>(made.residual, place, p.dtype);
      store_any<W>(made.grad_x, place, p.dtype, v[i]);
    }
    sum += of_run;
    products += products_of_run;
  });
  if (!p.read.norm) return;
  double* gathered = t.part->sums.data() + b.lane;
  add_to<W>(gathered, widen<W>(sum));
  add_to<W>(gathered + int64_t(blocks_of(p.channels, W)) * W, widen<W>(products));
}

template <int W, int K, int S> EFFNET_INLINE void run_backward(const Task& t) {
  using namespace simd;
  const Depthwise& p = *t.p;
  const Gradients& made = *t.gradients;
  const Rings size(p);
  const int blocks = blocks_of(p.channels, W), groups = (blocks - 1) / t.group + 1;
  const int64_t x_ring = int64_t(K) * size.columns * W, g_ring = int64_t(K) * size.outputs * W, all_taps = K * K * W;
  const int64_t of_block = 2 * x_ring + g_ring + 2 * all_taps;
  float* memory = scratch<Task>(t.group * of_block);
  std::fill_n(memory, t.group * of_block, 0.f);
  for (int64_t unit = t.part->first; unit < t.part->last; ++unit) {
    const int64_t image = unit / groups;
    const int begin = int(unit % groups) * t.group, count = std::min(t.group, blocks - begin);
    const auto block_at = [&](int j) {
      float* at = memory + j * of_block;
      float* taps = at + 2 * x_ring + g_ring;
      return Block<W>{block_start<W>(begin + j, p.channels),
                      (begin + j) * W,
                      at,
                      at + x_ring,
                      at + 2 * x_ring,
                      reinterpret_cast<float (*)[W]>(taps),
                      reinterpret_cast<float (*)[W]>(taps + all_taps)};
    };
    for (int j = 0; j < count; ++j) {
      const Block<W> b = block_at(j);
      float taps[K * K][W];
      load_taps<W, K>(p, b.channel, taps);
      reverse_taps<W, K, S, 0>(taps, b.taps);
      if constexpr (S == 2) reverse_taps<W, K, S, 1>(taps, b.taps + K * kTaps<K, S, 0>);
      std::fill_n(b.grad_taps[0], all_taps, 0.f);
    }
    int entered = 0, written = 0;
    for (int out = 0; out < p.out_height; ++out) {
      const int top = out * S - p.pad_top, from = std::max(top, 0), to = std::min(top + K, p.height);
      const int known = out + 1 == p.out_height ? p.height : std::clamp(top + S, written, p.height);
      for (int j = 0; j < count; ++j) {
        const Block<W> b = block_at(j);
        const auto enter = [&](int row) __attribute__((always_inline)) {
          const int64_t slot = int64_t(row % K) * size.columns * W;
          enter_row<W>(p, image, row, b.channel, b.ring + slot, b.slopes + slot);
        };
        for (int row = std::max(entered, from); row < to; ++row) enter(row);
        const GradientOf<W> gradient(made.of_y, p.dtype, p.channels, b.channel, image);
        float* gradients = b.gradients + (out % K * size.outputs + K) * W;
        const int64_t y = (image * p.out_height + out) * p.out_width * p.channels + b.channel;
        for (int column = 0; column < p.out_width; ++column)
          store<W>(gradients + column * W, gradient.at(made.of_y, y + int64_t(column) * p.channels));
        if (made.grad_weight) add_weight<W, K, S>(p, size, b, out, from, to);
        if (!made.grad_x) continue;
        for (int row = written; row < known; ++row) {
          if (row >= std::max(entered, to)) enter(row);  // no window sees it
          write_phase<W, K, S, 0>(t, size, b, image, row);
          if constexpr (S == 2) write_phase<W, K, S, 1>(t, size, b, image, row);
        }
      }
      entered = std::max(entered, to);
      written = known;
    }
    for (int j = 0; made.grad_weight && j < count; ++j) {
      const Block<W> b = block_at(j);
      double* gathered = t.part->sums.data() + 2 * int64_t(blocks) * W + b.lane;
      for (int tap = 0; tap < K * K; ++tap) add_to<W>(gathered + int64_t(tap) * blocks * W, widen<W>(load<W>(b.grad_taps[tap])));
    }
  }
}

template <int W, int K, int S> EFFNET_INLINE void run_direction(const Task& t) {
  if (t.stats) return run_forward<W, K, S>(t);
  run_backward<W, K, S>(t);
}

template <int W> EFFNET_INLINE void run_any(const Task& t) {
  if (t.p->kernel == 3) return t.p->stride == 1 ? run_direction<W, 3, 1>(t) : run_direction<W, 3, 2>(t);
  return t.p->stride == 1 ? run_direction<W, 5, 1>(t) : run_direction<W, 5, 2>(t);
}

EFFNET_PER_WIDTH(run, run_any)

// How the work is shared out: blocks in a group, units, and how many threads are worth while.
struct Split {
  int width, blocks, group;
  int64_t units, worth;
  Split(const Depthwise& p, bool backward) : width(simd::width_for(p.channels)), blocks(blocks_of(p.channels, width)) {
    const Rings size(p);
    const int64_t ring = int64_t(p.kernel) * width * (backward ? 2 * size.columns + size.outputs : size.columns);
    const int64_t threads = thread_count(), shared = p.images < threads ? (blocks + threads - 1) / threads : blocks;
    group = int(std::clamp<int64_t>(kRings / ring, 1, shared));
    units = p.images * ((blocks - 1) / group + 1);
    worth = p.images * p.out_height * p.out_width * p.channels * (p.kernel * p.kernel + 16) / kGrain;
  }
};

}  // namespace

void depthwise_stats_cpu(const Depthwise& p, const Stats& made) {
  const Split split(p, false);
  const Gathered gathered = in_parts(split.worth, split.units, [&](Part& part) {
    part.sums.resize(2 * split.blocks * split.width);
    run(Task{&p, &made, nullptr, split.group, &part}, split.width);
  });
  finish_stats(gathered, p.images * p.out_height * p.out_width, p.channels, split.width, made.mean, made.var);
}

void depthwise_backward_cpu(const Depthwise& p, const Gradients& made) {
  const Split split(p, true);
  const int numbers = 2 + p.kernel * p.kernel;
  const Gathered gathered = in_parts(split.worth, split.units, [&](Part& part) {
    part.sums.resize(int64_t(numbers) * split.blocks * split.width);
    run(Task{&p, nullptr, &made, split.group, &part}, split.width);
  });
  std::vector<float> sums(int64_t(numbers) * p.channels);
  add_up(gathered, 1, numbers, p.channels, split.width, sums.data());
  if (made.sums) std::copy_n(sums.data(), 2 * p.channels, made.sums);
  for (int tap = 2; made.grad_weight && tap < numbers; ++tap)
    for (int c = 0; c < p.channels; ++c) made.grad_weight[c * (numbers - 2) + tap - 2] = sums[int64_t(tap) * p.channels + c];
}

}  // namespace effnet_fast::training
