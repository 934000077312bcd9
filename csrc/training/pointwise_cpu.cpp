// Training's pointwise convolution on the CPU: forward with statistics, and both gradients in one pass.
//
// A thread owns a range of rows (pixels of the batch) and takes them on in blocks whose tiles stay in L2. Forward: the block is
// activated into a tile, the GEMM of csrc/pointwise writes its rows of y, and those are added to the statistics while they are hot.
// Backward: the gradient of y becomes a tile G [rows, K], in rows and in panels of W channels; then, kColumns channels of x at a
// time, the activated x becomes a tile A with a tile of slopes beside it, the GEMM makes Z = G W, a pass over it the gradient of x
// and the sums, and G^T A is added to the thread's own grad_weight. So every
// tensor is read or written once. The multiply-adds bind where C and K are large; SiLU and its slope, 20 instructions and a
// division for each element of x, where they are small.
//
// G^T A is made of tiles of R rows of G^T by V vectors of A in registers, the block's rows deep.
#include <memory>

#include "../common/scratch.h"
#include "../pointwise/params.h"
#include "elements.h"

namespace effnet_fast::training {
namespace {

constexpr int kRows = 48;            // a block is a multiple of the GEMM's
constexpr int64_t kTile = 96 << 10;  // floats in a block's tiles together
constexpr int kColumns = 288;        // channels of x taken on at once in the backward: a multiple of the GEMM's panels
constexpr int64_t kGrain = 1 << 18;  // multiply-adds worth a thread

struct Task {
  const Pointwise* p;
  const Stats* stats;          // forward
  const Gradients* gradients;  // or backward
  const void* packed;          // the weight, or backward its transpose
  Part* part;                  // of the rows; forward it gathers the sums of y's values and squares, backward those of x
  float* grad_weight;          // [padded K, padded C]
};

template <int W> constexpr int kAcross = W == 16 ? 8 : W > 1 ? 4 : 1;  // rows of G^T in registers

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Of a block, forward and backward.
int64_t block_rows(int64_t floats_a_row) { return std::clamp<int64_t>(kTile / floats_a_row / kRows * kRows, kRows, 10 * kRows); }

// Channels [first, last) of the convolution of csrc/pointwise without a norm: `rows` of x, fp32, with a packed weight. y begins
// with the first of them.
void multiply(const float* x, const void* packed, int64_t rows, int in, int out, int first, int last, float* y, int64_t y_row) {
  pointwise::Params p{};
  p.x = x;
  p.packed = packed;
  p.y = y - first;
  p.y_row = y_row;
  p.rows = p.pixels = rows;
  p.in_channels = in;
  p.out_channels = out;
  p.activation = Activation::identity;
  p.dtype = p.weight_dtype = p.norm_dtype = DType::fp32;
  pointwise::part_cpu(p, {0, rows, first, last});
}

// Floats that nothing was written to yet.
using Floats = std::unique_ptr<float[]>;
Floats fresh(int64_t count) { return Floats(new float[count]); }

// Memory for a packed weight [out, in], at a multiple of 64 bytes.
struct Packed {
  Floats memory;
  void* at;
};

// The weight, or its transpose, packed without a norm.
Packed packed_weight(const Pointwise& p, bool transposed) {
  const int64_t out = p.out_channels, in = p.in_channels;
  const float* weight = static_cast<const float*>(p.weight);
  Floats made;
  if (transposed || p.weight_dtype != DType::fp32) {
    made = fresh(out * in);
    weight = made.get();
    constexpr int64_t kTogether = 16;  // rows of which a line each is read or written at a time
    parallel_for((out + kTogether - 1) / kTogether, kGrain / (kTogether * in) + 1, [&](int64_t begin, int64_t end) {
      with_dtype(p.weight_dtype, [&](auto type) {
        const auto* read = static_cast<const decltype(type)*>(p.weight);
        for (int64_t group = begin; group < end; ++group)
          for (int64_t c = 0; c < in; ++c)
            for (int64_t k = group * kTogether; k < std::min(out, (group + 1) * kTogether); ++k)
              made[transposed ? c * out + k : k * in + c] = to_float(read[k * in + c]);
      });
    });
  }
  pointwise::Params g{};
  g.weight = weight;
  g.out_channels = int(transposed ? in : out);
  g.in_channels = int(transposed ? out : in);
  const std::vector<float> zeros(g.out_channels), ones(g.out_channels, 1.f);
  g.norm_mean = zeros.data();
  g.norm_var = ones.data();
  g.dtype = g.weight_dtype = g.norm_dtype = DType::fp32;
  Packed packed{fresh(pointwise::packed_bytes(g) / sizeof(float) + 16), nullptr};
  packed.at = reinterpret_cast<void*>(rounded_up(reinterpret_cast<int64_t>(packed.memory.get()), 64));
  pointwise::pack_cpu(g, packed.at);
  return packed;
}

// --- forward ---------------------------------------------------------------------------------------------------------------

template <int W> EFFNET_INLINE void run_forward(const Task& t) {
  using namespace simd;
  const Pointwise& p = *t.p;
  const int in = p.in_channels, out = p.out_channels, blocks = blocks_of(out, W);
  const int64_t most = block_rows(in + out);
  const bool reads = p.read.norm || p.dtype != DType::fp32, writes = p.dtype != DType::fp32;
  float* tile = scratch<Task>(std::max<int64_t>(1, most * ((reads ? in : 0) + (writes ? out : 0))));
  float* made = tile + (reads ? most * in : 0);
  for (int64_t row = t.part->first; row < t.part->last; row += most) {
    const int64_t rows = std::min(most, t.part->last - row);
    for (int64_t top = 0, end; reads && top < rows; top = end) {  // the rows of one image
      const int64_t image = (row + top) / p.pixels;
      end = std::min(rows, (image + 1) * p.pixels - row);
      for (int block = 0; block < blocks_of(in, W); ++block) {
        const int channel = block_start<W>(block, in);
        const Float<W> gate = p.read.gate ? load<W>(p.read.gate + image * in + channel) : Float<W>{} + 1.f;
        const auto each = [&](auto&& activated) __attribute__((always_inline)) {
          for (int64_t r = top; r < end; ++r)
            store<W>(tile + r * in + channel, activated(load_any<W>(p.read.x, (row + r) * in + channel, p.dtype)));
        };
        if (!p.read.norm) {
          each([](Float<W> x) __attribute__((always_inline)) { return x; });
          continue;
        }
        const Vectors<W> norm(p.read.norm, in, channel);
        each([&](Float<W> x) __attribute__((always_inline)) { return activate<W>(p.read.activation, norm(x)) * gate; });
      }
    }
    float* y = writes ? made : static_cast<float*>(t.stats->y) + row * out;
    multiply(reads ? tile : static_cast<const float*>(p.read.x) + row * in, t.packed, rows, in, out, 0, out, y, out);
    for (int block = 0; block < blocks; ++block) {
      const int channel = block_start<W>(block, out);
      Totals<W> totals;
      for (int64_t r = 0; r < rows; ++r) {
        Float<W> v = load<W>(y + r * out + channel);
        if (writes) v = store_any<W>(t.stats->y, (row + r) * out + channel, p.dtype, v);
        totals.add(v);
      }
      add_to<W>(t.part->sums.data() + block * W, totals.sum);
      add_to<W>(t.part->sums.data() + (blocks + block) * W, totals.squares);
    }
  }
}

// --- backward --------------------------------------------------------------------------------------------------------------

// made[R rows][V vectors] += G^T A over `rows`; g is a column of a panel, W floats a row.
template <int W, int V>
EFFNET_INLINE void outer(const float* g, const float* a, int64_t a_pitch, int64_t rows, float* made, int64_t made_pitch) {
  using namespace simd;
  constexpr int R = kAcross<W>;
  Float<W> total[R][V] = {};
  for (int64_t r = 0; r < rows; ++r, g += W, a += a_pitch) {
    Float<W> v[V];
#pragma GCC unroll 3
    for (int i = 0; i < V; ++i) v[i] = load<W>(a + i * W);
#pragma GCC unroll 8
    for (int k = 0; k < R; ++k) {
      const float value = g[k];
#pragma GCC unroll 3
      for (int i = 0; i < V; ++i) total[k][i] += v[i] * value;
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < R; ++k)
#pragma GCC unroll 3
    for (int i = 0; i < V; ++i) {
      float* at = made + k * made_pitch + i * W;
      store<W>(at, load<W>(at) + total[k][i]);
    }
}

// Channels [first, last) of x, and the pitch of their tiles: an odd number of lines, so that rows fall into different sets of L1.
struct Columns {
  int first, last;
  int64_t pitch;
};

// Their activated values and slopes become tiles.
template <int W>
EFFNET_INLINE void activate_columns(const Pointwise& p, const Columns& c, int64_t row, int64_t rows, float* a, float* slope) {
  using namespace simd;
  for (int at = c.first; at < c.last; at += W) {
    const int channel = std::min(at, c.last - W);
    const auto each = [&](auto&& body) __attribute__((always_inline)) {
      for (int64_t r = 0; r < rows; ++r)
        body(load_any<W>(p.read.x, (row + r) * p.in_channels + channel, p.dtype), r * c.pitch + channel - c.first);
    };
    if (!p.read.norm) {
      each([&](Float<W> x, int64_t i) __attribute__((always_inline)) { store<W>(a + i, x); });
      continue;
    }
    const Vectors<W> norm(p.read.norm, p.in_channels, channel);
    each([&](Float<W> x, int64_t i) __attribute__((always_inline)) {
      const Activated<W> activated = activate_with_slope<W>(p.read.activation, norm(x));
      store<W>(a + i, activated.value);
      store<W>(slope + i, activated.slope);
    });
  }
  for (int64_t r = 0; c.last - c.first < c.pitch && r < rows; ++r)
    std::fill(a + r * c.pitch + c.last - c.first, a + (r + 1) * c.pitch, 0.f);
}

// From the tile z of what the columns' gradient is before the activation: the gradient of x and the sums.
template <int W> EFFNET_INLINE void finish_columns(const Task& t, const Columns& c, int64_t row, int64_t rows, const float* z,
                                                   const float* a, const float* slope) {
  using namespace simd;
  const Pointwise& p = *t.p;
  const Gradients& made = *t.gradients;
  const bool norm = p.read.norm, gated = p.read.gate;
  const int lanes = blocks_of(p.in_channels, W) * W, numbers = gated ? 5 : norm ? 2 : 0;
  for (int64_t top = 0, end; top < rows; top = end) {  // the rows of one image
    const int64_t image = (row + top) / p.pixels;
    end = std::min(rows, (image + 1) * p.pixels - row);
    double* gathered = t.part->sums.data() + (gated ? (image - t.part->first_image) * 5 * lanes : 0);
    for (int at = c.first; at < c.last; at += W) {
      const int channel = std::min(at, c.last - W), lane = at;
      const Float<W> mean = norm ? load<W>(p.read.norm + channel) : Float<W>{};
      for (int64_t start = top; start < end; start += kChunk) {
        Float<W> sums[5] = {};
        for (int64_t r = start; r < std::min(end, start + kChunk); ++r) {
          const int64_t i = (row + r) * p.in_channels + channel, in_tile = r * c.pitch + channel - c.first;
          Float<W> v = load<W>(z + in_tile);
          if (norm) {
            const Float<W> s = load<W>(slope + in_tile), centred = load_any<W>(p.read.x, i, p.dtype) - mean;
            if (gated) {
              const Float<W> product = v * s;
              sums[0] += v * load<W>(a + in_tile);
              sums[1] += product;
              sums[2] += s;
              sums[3] += product * centred;
              sums[4] += s * centred;
            } else {
              v *= s;
              sums[0] += v;
              sums[1] += v * centred;
            }
          }
          if (made.residual) v += load_any<W>(made.residual, i, p.dtype);
          store_any<W>(made.grad_x, i, p.dtype, v);
        }
        for (int k = 0; k < numbers; ++k) add_to<W>(gathered + k * lanes + lane, widen<W>(sums[k]));
      }
    }
  }
}

// The gradient of y for some rows: as rows of K for the GEMM, and as panels of W channels for what comes of the weight.
template <int W>
EFFNET_INLINE void gradient_rows(const Pointwise& p, const Gradient& of_y, int64_t row, int64_t rows, float* dense, float* panels) {
  using namespace simd;
  const int out = p.out_channels;
  for (int64_t top = 0, end; top < rows; top = end) {  // the rows of one image
    const int64_t image = (row + top) / p.pixels;
    end = std::min(rows, (image + 1) * p.pixels - row);
    for (int block = 0; block < blocks_of(out, W); ++block) {
      const int channel = block_start<W>(block, out), overlap = block * W - channel;
      const GradientOf<W> gradient(of_y, p.dtype, out, channel, image);
      float* panel = panels + block * rows * W;
      for (int64_t r = top; r < end; ++r) {
        const Float<W> v = gradient.at(of_y, (row + r) * out + channel);
        store<W>(dense + r * out + channel, v);
        if (overlap == 0) {
          store<W>(panel + r * W, v);
          continue;
        }
        for (int i = 0; i < W; ++i) panel[r * W + i] = i + overlap < W ? v[i + overlap] : 0.f;
      }
    }
  }
}

template <int W> EFFNET_INLINE void run_backward(const Task& t) {
  using namespace simd;
  const Pointwise& p = *t.p;
  const Gradients& made = *t.gradients;
  const int in = p.in_channels, out = p.out_channels;
  const int alone = pointwise::panel_channels() / 2;  // so many channels left over are of the GEMM's last panel
  const int64_t most = block_rows(2 * out + 3 * std::min(in, kColumns)), padded_out = rounded_up(out, W);
  const int64_t made_pitch = rounded_up(in, W), widest = rounded_up(std::min(in, kColumns + alone), 16) + 16;
  float* panels = scratch<Task>(most * (padded_out + out + 3 * widest));
  float *dense = panels + most * padded_out, *a = dense + most * out, *slope = a + most * widest, *z = slope + most * widest;
  for (int64_t row = t.part->first; row < t.part->last; row += most) {
    const int64_t rows = std::min(most, t.part->last - row);
    gradient_rows<W>(p, made.of_y, row, rows, dense, panels);
    for (int first = 0, last; first < in; first = last) {
      last = in - first <= kColumns + alone ? in : first + kColumns;
      const Columns c{first, last, (rounded_up(last - first, 16) / 16 | 1) * 16};
      activate_columns<W>(p, c, row, rows, a, slope);
      if (made.grad_x) {
        multiply(dense, t.packed, rows, out, in, first, last, z, c.pitch);
        finish_columns<W>(t, c, row, rows, z, a, slope);
      }
      if (!made.grad_weight) continue;
      for (int64_t r = 0; p.read.gate && r < rows; ++r) {
        const float* gate = p.read.gate + (row + r) / p.pixels * in + first;
        for (int i = 0; i < last - first; ++i) a[r * c.pitch + i] *= gate[i];
      }
      for (int64_t top = 0; top < rows; top += kRows) {  // longer sums round worse
        const int64_t some = std::min<int64_t>(kRows, rows - top), vectors = (last - first + W - 1) / W;
        for (int64_t i = 0, taken; i < vectors; i += taken) {
          taken = std::min<int64_t>(3, vectors - i);
          for (int64_t k = 0; k < padded_out; k += kAcross<W>) {
            const float* g = panels + (k / W * rows + top) * W + k % W;
            const float* of_a = a + top * c.pitch + i * W;
            float* at = t.grad_weight + k * made_pitch + first + i * W;
            switch (taken) {
              case 1: outer<W, 1>(g, of_a, c.pitch, some, at, made_pitch); break;
              case 2: outer<W, 2>(g, of_a, c.pitch, some, at, made_pitch); break;
              case 3: outer<W, 3>(g, of_a, c.pitch, some, at, made_pitch); break;
            }
          }
        }
      }
    }
  }
}

template <int W> EFFNET_INLINE void run_any(const Task& t) {
  if (t.stats) return run_forward<W>(t);
  run_backward<W>(t);
}

EFFNET_PER_WIDTH(run, run_any)

// Groups of kRows rows that there are, and the rows of a part of them.
int64_t groups_of(const Pointwise& p) { return (p.images * p.pixels + kRows - 1) / kRows; }
void set_rows(const Pointwise& p, Part& part) {
  part.first *= kRows;
  part.last = std::min(part.last * kRows, p.images * p.pixels);
}
int64_t worth(const Pointwise& p) { return p.images * p.pixels * p.in_channels * p.out_channels / kGrain; }

}  // namespace

void pointwise_stats_cpu(const Pointwise& p, const Stats& made) {
  const int width = simd::width_for(std::min(p.in_channels, p.out_channels));
  const Packed packed = packed_weight(p, false);
  const Gathered gathered = in_parts(worth(p), groups_of(p), [&](Part& part) {
    set_rows(p, part);
    part.sums.resize(2 * blocks_of(p.out_channels, width) * width);
    run(Task{&p, &made, nullptr, packed.at, &part, nullptr}, width);
  });
  finish_stats(gathered, p.images * p.pixels, p.out_channels, width, made.mean, made.var);
}

void pointwise_backward_cpu(const Pointwise& p, const Gradients& made) {
  const int in = p.in_channels, out = p.out_channels, width = simd::width_for(std::min(in, out));
  const int64_t lanes = rounded_up(in, width);
  const Packed packed = made.grad_x ? packed_weight(p, true) : Packed{};
  std::vector<std::vector<float>> grad_weights(made.grad_weight ? thread_count() : 0);
  const Gathered gathered = in_parts(worth(p), groups_of(p), [&](Part& part) {
    float* grad_weight = nullptr;
    if (made.grad_weight) {
      auto& mine = grad_weights[part.number];
      mine.resize(lanes * rounded_up(out, width));
      grad_weight = mine.data();
    }
    set_rows(p, part);
    if (p.read.gate)
      part.set_images(part.first / p.pixels, (part.last - 1) / p.pixels, 5 * lanes);
    else
      part.sums.resize(2 * lanes);
    run(Task{&p, nullptr, &made, packed.at, &part, grad_weight}, width);
  });
  parallel_for(made.grad_weight ? out : 0, kGrain / in + 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t c = 0; c < in; ++c) {
        float total = 0;
        for (size_t i = 0; i < gathered.size(); ++i) total += grad_weights[i][k * lanes + c];
        made.grad_weight[k * in + c] = total;
      }
  });
  if (made.sums) add_up(gathered, p.read.gate ? p.images : 1, p.read.gate ? 5 : 2, in, width, made.sums);
}

}  // namespace effnet_fast::training
