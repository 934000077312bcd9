// The pointwise convolution on the CPU: a GEMM of [rows, in_channels] with weight^T, gate in its prologue, norm, activation and
// residual in its epilogue.
//
// A thread owns a rectangle of the output: a range of rows, a range of channels, or both (split_work). Vectors run along the
// output channels. It packs the weights of a group of its channels, transposed, into scratch that stays in L2, and goes over its
// rows kBlock at a time: each panel of up to three vectors of channels is multiplied with up to twelve rows in registers,
// in_channels deep, then the block is finished in L1: longer runs of SiLU than one of registers hide its latency. What is
// multiplied are Elements: floats, or pairs of bf16 where the processor has their dot products (bf16_pairs.h). Rows that are no
// Elements yet (fp16, bf16 elsewhere, an odd number of channels) are converted into a block of scratch. The gate goes into the
// weights of each image, or, where an image has few pixels, into that block.
//
// An output costs in_channels multiply-adds; x is read once for each group of channels, y is written and the residual read once,
// the weights are read once by every thread that shares their channels, and once an image if they take its gate. While a block is
// multiplied by its first panel the next one's rows are fetched, a line at a time: asked for all at once they would be waited for.
// The multiply-adds bind, one vector of them (two of bf16 pairs) for each half of a vector loaded: deep layers reach 95 % of their
// rate. Below about 40 input channels SiLU does, and in bf16 below 200.
#if defined(__GNUC__) && !defined(__clang__)
// Moving common expressions between loops fills the registers with pointers to rows, and SiLU's constants go to the stack.
#pragma GCC optimize("no-gcse")
#endif
#include <algorithm>
#include <type_traits>
#include <utility>

#include "../common/norm.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/simd.h"
#include "bf16_pairs.h"
#include "params.h"

namespace effnet_fast::pointwise {
namespace {

constexpr int kBlock = 48;             // rows that a thread takes on at once: a multiple of every kernel's rows
constexpr int kChunk = 64;             // products added up before they join a total: a longer chain rounds worse than oneDNN
constexpr int kSlice = 768;            // Elements of a row taken on at once, so that kPacked holds more than a panel
constexpr int kPartialRows = 256;      // rows whose sums wait for the next slice
constexpr int kPacked = 96 << 10;      // packed weights, in Elements, that stay in L2 beside a block of rows
constexpr int kLine = 16;              // Elements in a line of the caches
constexpr int kWeightsAhead = 160;     // that are fetched while others are packed, ten lines of a row
constexpr int64_t kGrain = 1 << 20;    // multiply-adds worth a thread: waking a sleeping one costs about 30 us
constexpr double kPackCost = 0.4;      // packing a weight,
constexpr double kGateCost = 0.15;     // multiplying a gate into a packed one, and
constexpr double kPrologueCost = 0.3;  // multiplying a gate into an input, in multiply-adds of a vector

// What a thread does.
struct Task {
  const Params* params;
  Part part;
  void* packed;  // where the weights of all channels are packed to, and nothing else is done; or null
};

// Rows of the register tile of V vectors: as many as the registers hold.
constexpr int kMostRows = 12;
template <int W, int V> constexpr int kRows = W == 16 ? (V == 3 ? 8 : 12) : V == 3 ? 4 : V == 2 ? 6 : 12;

// --- packing ---------------------------------------------------------------------------------------------------------------

// log2(W) perfect shuffles of W rows transpose them.
template <int W> EFFNET_INLINE void transpose(simd::Float<W> (&rows)[W]) {
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    simd::Float<W> shuffled[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      shuffled[2 * i] = simd::interleave<W, false>(rows[i], rows[i + W / 2]);
      shuffled[2 * i + 1] = simd::interleave<W, true>(rows[i], rows[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = shuffled[i];
  }
}

// Input channels in an Element of a row: one float, or a Pair.
template <typename Element> constexpr int kDepth = std::is_same_v<Element, float> ? 1 : 2;

template <int W, typename T> EFFNET_INLINE simd::Float<W> load_gated(const T* p, const float* gate) {
  return gate ? simd::load<W>(p) * simd::load<W>(gate) : simd::load<W>(p);
}

// W Elements of a weight's row, times the gates if there are any.
template <int W, typename Element, typename T> EFFNET_INLINE simd::Float<W> load_weights(const T* weight, const float* gate) {
  using namespace simd;
  if constexpr (std::is_same_v<Element, float>) return load_gated<W>(weight, gate);
  bf16 pairs[2 * W];
  if (std::is_same_v<T, bf16> && !gate) {
    memcpy(pairs, weight, sizeof(pairs));
  } else {
    store<W>(pairs, load_gated<W>(weight, gate));
    store<W>(pairs + W, load_gated<W>(weight + W, gate ? gate + W : nullptr));
  }
  Float<W> bits;
  memcpy(&bits, pairs, sizeof(bits));
  return bits;
}

// One vector of channels: packed[i * pitch + lane] = Element i of weight[lane * stride ...] * gate, zero beyond `channels` and
// `depth`.
template <int W, typename Element, typename T>
EFFNET_INLINE void pack(const T* weight, int64_t stride, const float* gate, int depth, int channels, Element* packed, int pitch) {
  using namespace simd;
  constexpr int kWide = W * kDepth<Element>;
  for (int i = 0; i < depth; i += kWide, packed += int64_t(W) * pitch) {
    const int count = std::min(kWide, depth - i);
    T edge[W][kWide];
    float edge_gate[kWide] = {};
    const T* rows = weight + i;
    const float* gates = gate ? gate + i : nullptr;
    int64_t between = stride;
    if (channels < W || count < kWide) {
      memset(edge, 0, sizeof(edge));
      for (int lane = 0; lane < channels; ++lane) memcpy(edge[lane], rows + lane * stride, count * sizeof(T));
      rows = edge[0];
      between = kWide;
      if (gate) {
        std::copy_n(gates, count, edge_gate);
        gates = edge_gate;
      }
    }
    // From the end of these rows on, the beginning of the next ones.
    const T* next = weight + i + kWeightsAhead + (i + kWeightsAhead < depth ? 0 : W * stride - depth);
#pragma GCC unroll 16
    for (int lane = 0; lane < W; ++lane) __builtin_prefetch(next + lane * stride);
    Float<W> tile[W];
#pragma GCC unroll 16
    for (int lane = 0; lane < W; ++lane) tile[lane] = load_weights<W, Element>(rows + lane * between, gates);
    transpose<W>(tile);
    const int elements = (count + kDepth<Element> - 1) / kDepth<Element>;
#pragma GCC unroll 16
    for (int k = 0; k < W; ++k)
      if (k < elements) memcpy(packed + int64_t(k) * pitch, &tile[k], sizeof(tile[k]));
  }
}

// --- rows ------------------------------------------------------------------------------------------------------------------

// Inputs [start, start + depth) of a row, as Elements, times the gates if there are any.
template <int W, typename T> EFFNET_INLINE void copy_row(const T* x, const float* gate, int depth, float* output) {
  int i = 0;
  for (; i + W <= depth; i += W) simd::store<W>(output + i, load_gated<W>(x + i, gate ? gate + i : nullptr));
  for (; i < depth; ++i) output[i] = gate ? to_float(x[i]) * gate[i] : to_float(x[i]);
}
#if defined(__x86_64__)
template <int W> EFFNET_INLINE void copy_row(const bf16* x, const float* gate, int depth, Pair* output) {
  copy_pairs(x, gate, depth, output);
}
#endif

template <typename Element, typename T> struct Rows {
  const Element* at;
  int pitch;
  const T* ahead;  // as many rows to come, which are fetched meanwhile, or null
  int64_t ahead_pitch;
};

// A range of the input channels, and how many Elements it is.
struct Slice {
  int start, depth, elements;
};

// The one that begins at Element `start`, of at most so many.
template <typename Element> EFFNET_INLINE Slice slice_at(const Params& p, int start, int most) {
  const int elements = std::min(most, (p.in_channels - 1) / kDepth<Element> + 1 - start);
  return {start * kDepth<Element>, std::min(elements * kDepth<Element>, p.in_channels - start * kDepth<Element>), elements};
}

// tile[R][V * W] = or, if `adds`, += R rows of x times a packed panel.
template <int W, int R, int V, typename T>
EFFNET_INLINE void multiply(const Rows<float, T>& x, const float* panel, int depth, bool adds, float* tile) {
  using namespace simd;
  int start = 0;
  do {
    const int end = std::min(depth, start + kChunk);
    Float<W> sums[R][V] = {};
    for (int i = start; i < end;) {
      if (x.ahead)
        for (int r = 0; r < R; ++r) __builtin_prefetch(x.ahead + r * x.ahead_pitch + i, 0, 2);
      for (const int stop = x.ahead ? std::min(i + kLine, end) : end; i < stop; ++i) {
        Float<W> weights[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) weights[v] = load<W>(panel + (int64_t(i) * V + v) * W);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const float value = x.at[int64_t(r) * x.pitch + i];
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) sums[r][v] += weights[v] * value;
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        float* total = tile + (r * V + v) * W;
        store<W>(total, start == 0 && !adds ? sums[r][v] : load<W>(total) + sums[r][v]);
      }
    start = end;
  } while (start < depth);
}

#if defined(__x86_64__)
template <int W, int R, int V, typename T>
EFFNET_INLINE void multiply(const Rows<Pair, T>& x, const Pair* panel, int depth, bool adds, float* tile) {
  multiply_pairs<R, V>(x.at, x.pitch, x.ahead, x.ahead_pitch, panel, depth, adds, tile);
}
#endif

// As many of the next rows as there is a kernel for, at most `rows`; returns how many.
template <int W, int V, int R = kRows<W, V>, typename Element, typename T>
EFFNET_INLINE int multiply_some(const Rows<Element, T>& x, const Element* panel, int depth, int rows, bool adds, float* tile) {
  if constexpr (R > 1) {
    constexpr int kFewer = R > 8 ? 8 : R > 4 ? 4 : R / 2;
    if (rows < R) return multiply_some<W, V, kFewer>(x, panel, depth, rows, adds, tile);
  }
  multiply<W, R, V>(x, panel, depth, adds, tile);
  return R;
}

// A panel of packed weights, and what becomes of its products.
template <typename Element> struct Panel {
  const Element* weights;
  const float *scale, *shift;
  int vectors;
  int channel;  // the first
};

// Norm, activation and residual of a tile of V vectors, from that row of the output.
template <int W, int V, Activation activation, typename T, typename Element>
EFFNET_INLINE void finish(const Params& p, const Panel<Element>& panel, const float* tile, int64_t row, int rows) {
  using namespace simd;
  T* y = static_cast<T*>(p.y) + row * p.y_row + panel.channel;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * p.out_channels + panel.channel : nullptr;
  const int last = std::min(W, p.out_channels - panel.channel - (V - 1) * W);  // channels in the last vector
  Float<W> scale[V], shift[V];
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    scale[v] = load<W>(panel.scale + v * W);
    shift[v] = load<W>(panel.shift + v * W);
  }
  for (int r = 0; r < rows; ++r, tile += V * W, y += p.y_row) {
    Float<W> value[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) value[v] = activate<W>(activation, load<W>(tile + v * W) * scale[v] + shift[v]);
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const bool whole = v + 1 < V || last == W;
      if (residual) value[v] += whole ? load<W>(residual + v * W) : load_first<W>(residual + v * W, last);
      if (whole) {
        store<W>(y + v * W, value[v]);
      } else {
        store_first<W>(y + v * W, value[v], last);
      }
    }
    if (residual) residual += p.out_channels;
  }
}

// Rows [row, row + rows) of the output, which come from x: the slice of its inputs that the panel of V vectors holds the weights
// of. Between slices the products wait in `partial`, [rows][V * W].
template <int W, int V, typename T, typename Element> EFFNET_INLINE void run_vectors(const Params& p, const Panel<Element>& panel,
                                                                                     Rows<Element, T> x, const Slice& slice,
                                                                                     int64_t row, int rows, float* partial) {
  alignas(64) float made[kBlock * V * W];
  const bool adds = slice.start > 0, finishes = slice.start + slice.depth == p.in_channels;
  float* const tile = adds || !finishes ? partial : made;
  for (int r = 0, taken; r < rows; r += taken) {
    for (int i = r; finishes && i < std::min(rows, r + kRows<W, V>); ++i)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        const int channel = panel.channel + v * W;
        // A tenth to a fifth of the time of outputs beyond L2.
        __builtin_prefetch(static_cast<T*>(p.y) + (row + i) * p.y_row + channel, 1);
        if (p.residual) __builtin_prefetch(static_cast<const T*>(p.residual) + (row + i) * p.out_channels + channel);
      }
    taken = multiply_some<W, V>(x, panel.weights, slice.elements, rows - r, adds, tile + r * V * W);
    x.at += int64_t(taken) * x.pitch;
    if (x.ahead) x.ahead += taken * x.ahead_pitch;
  }
  if (!finishes) return;
  switch (p.activation) {
    case Activation::silu: return finish<W, V, Activation::silu, T>(p, panel, tile, row, rows);
    case Activation::relu: return finish<W, V, Activation::relu, T>(p, panel, tile, row, rows);
    case Activation::relu6: return finish<W, V, Activation::relu6, T>(p, panel, tile, row, rows);
    default: return finish<W, V, Activation::identity, T>(p, panel, tile, row, rows);
  }
}

template <int W, typename T, typename Element> EFFNET_INLINE void run_panel(const Params& p, const Panel<Element>& panel,
                                                                            const Rows<Element, T>& x, const Slice& slice,
                                                                            int64_t row, int rows, float* partial) {
  switch (panel.vectors) {
    case 1: return run_vectors<W, 1, T>(p, panel, x, slice, row, rows, partial);
    case 2: return run_vectors<W, 2, T>(p, panel, x, slice, row, rows, partial);
    case 3: return run_vectors<W, 3, T>(p, panel, x, slice, row, rows, partial);
  }
}

// --- a thread's part ---------------------------------------------------------------------------------------------------------

constexpr int panel_vectors(int left) { return left == 1 || left == 3 ? left : 2; }

// The panels of `count` vectors of channels from `first` on, up to `last`, packed one after another. The gate is that of the slice.
template <int W, typename Element> EFFNET_INLINE void pack_group(const Params& p, const Slice& slice, const float* gate, int first,
                                                                 int last, int count, Element* packed) {
  for (int v = 0, panel = 0; v < count; v += panel) {
    panel = panel_vectors(count - v);
    for (int k = v; k < v + panel; ++k) {
      const int channel = first + k * W, channels = std::min(W, last - channel), in = p.in_channels, depth = slice.depth;
      Element* target = packed + int64_t(v) * W * slice.elements + (k - v) * W;
      const int64_t at = int64_t(channel) * in + slice.start;
      switch (p.weight_dtype) {
        case DType::fp32: pack<W>(static_cast<const float*>(p.weight) + at, in, gate, depth, channels, target, panel * W); break;
        case DType::bf16: pack<W>(static_cast<const bf16*>(p.weight) + at, in, gate, depth, channels, target, panel * W); break;
        case DType::fp16: pack<W>(static_cast<const fp16*>(p.weight) + at, in, gate, depth, channels, target, panel * W); break;
      }
    }
  }
}

// `count` vectors of channels, packed for a slice, times its gate.
template <int W>
EFFNET_INLINE void gate_group(const float* weights, const Slice& slice, const float* gate, int count, float* gated) {
  using namespace simd;
  for (int v = 0, panel = 0; v < count; v += panel) {
    panel = panel_vectors(count - v);
    for (int i = 0; i < slice.elements; ++i)
      for (int k = 0; k < panel; ++k, weights += W, gated += W) store<W>(gated, load<W>(weights) * gate[i]);
  }
}

// Elements in a slice of the input channels.
int slice_of(int elements) {
  const int slices = (elements - 1) / kSlice + 1;
  return slices == 1 ? elements : ((elements - 1) / slices / kChunk + 1) * kChunk;
}

// Whether gates are multiplied into the weights, which are then packed anew for each image, and not into copies of the rows. It
// changes what is rounded, so that neither the threads nor the batch may matter to it.
bool gates_weights(const Params& p, int element_depth) {
  const int group = std::min(p.out_channels, kPacked / slice_of((p.in_channels - 1) / element_depth + 1));
  return p.gate && group * (p.packed ? kGateCost : kPackCost) <= double(p.pixels) * kPrologueCost;
}

// What pack_cpu makes of all channels, rounded up to whole vectors: the folded norm, then for each slice its panels.
template <int W, typename Element> struct Packed {
  int channels;
  float *scale, *shift;
  Element* weights;
};

template <int W, typename Element> EFFNET_INLINE Packed<W, Element> packed_at(const Params& p, const void* memory) {
  const int channels = (p.out_channels + W - 1) / W * W;
  float* scale = static_cast<float*>(const_cast<void*>(memory));
  return {channels, scale, scale + channels, reinterpret_cast<Element*>(scale + 2 * channels)};
}

template <int W, typename Element> EFFNET_INLINE void pack_all(const Params& p, void* memory) {
  const Packed<W, Element> packed = packed_at<W, Element>(p, memory);
  const int elements = (p.in_channels - 1) / kDepth<Element> + 1, slice_elements = slice_of(elements);
  std::fill_n(packed.scale, 2 * packed.channels, 0.f);
  const Norm norm{p.norm_weight, p.norm_bias, p.norm_mean, p.norm_var, p.eps, p.norm_dtype};
  fold_norm(norm, 0, p.out_channels, packed.scale, packed.shift);
  for (int start = 0; start < elements; start += slice_elements) {
    const Slice slice = slice_at<Element>(p, start, slice_elements);
    pack_group<W>(p, slice, nullptr, 0, p.out_channels, packed.channels / W, packed.weights + int64_t(start) * packed.channels);
  }
}

template <int W, typename T, typename Element> EFFNET_INLINE void run_part(const Params& p, const Part& part) {
  const int vectors = (part.last_channel - part.first_channel + W - 1) / W;
  const int elements = (p.in_channels - 1) / kDepth<Element> + 1, slice_elements = slice_of(elements);
  const int slices = (elements - 1) / slice_elements + 1;
  const int groups = (vectors - 1) / std::max(2, kPacked / slice_elements / W) + 1;
  const int group = (vectors - 1) / groups / 2 * 2 + 2;  // even: whole panels
  const int most = std::min(vectors, group + 1);         // where one vector would be left over, it is a panel of three's
  const bool is_elements = sizeof(T) * kDepth<Element> == sizeof(Element) && p.in_channels % kDepth<Element> == 0;
  const bool can_gate = !p.packed || std::is_same_v<Element, float>;
  const bool into_weights = is_elements && can_gate && gates_weights(p, kDepth<Element>);
  const bool copies = !is_elements || (p.gate && !into_weights), packs = !p.packed || into_weights;
  const int pitch = ((slice_elements + 15) / 16 | 1) * 16;  // an odd number of lines: rows fall into different sets of L1
  const int64_t most_rows = std::min<int64_t>(slices == 1 ? INT64_MAX : kPartialRows, part.last_row - part.first_row);
  const size_t block_size = copies ? size_t(kBlock) * pitch : 0, partial_size = slices == 1 ? 0 : size_t(most_rows) * most * W;
  const size_t packed_size = packs ? size_t(most) * W * slice_elements : 0;
  float* folded = scratch<Task>(size_t(most) * W * 2 + packed_size + block_size + partial_size);
  float* partial = folded + 2 * most * W;
  Element *packed = reinterpret_cast<Element*>(partial + partial_size), *block = packed + packed_size;
  const Packed<W, Element> given = packed_at<W, Element>(p, p.packed);

  const Norm norm{p.norm_weight, p.norm_bias, p.norm_mean, p.norm_var, p.eps, p.norm_dtype};
  for (int64_t top = part.first_row, bottom; top < part.last_row; top = bottom) {
    const int64_t image = top / p.pixels;
    bottom = std::min({part.last_row, top + most_rows, into_weights ? (image + 1) * p.pixels : INT64_MAX});
    for (int begin = 0, count; begin < vectors; begin += count) {
      count = std::min(group, vectors - begin);
      if (vectors - begin - count == 1) ++count;
      const int first = part.first_channel + begin * W;
      const int last = std::min(part.last_channel, first + count * W);
      const float* scale = p.packed ? given.scale + first : folded;
      const float* shift = p.packed ? given.shift + first : folded + most * W;
      if (!p.packed) {
        std::fill_n(folded, 2 * most * W, 0.f);
        fold_norm(norm, first, last - first, folded, folded + most * W);
      }
      for (int start = 0; start < elements; start += slice_elements) {
        const Slice slice = slice_at<Element>(p, start, slice_elements);
        const float* gate = into_weights ? p.gate + image * p.in_channels + slice.start : nullptr;
        const Element* weights = packed;
        if (!p.packed) {
          pack_group<W>(p, slice, gate, first, last, count, packed);
        } else {
          weights = given.weights + int64_t(start) * given.channels + int64_t(first) * slice.elements;
          if constexpr (std::is_same_v<Element, float>)
            if (gate) {
              gate_group<W>(weights, slice, gate, count, packed);
              weights = packed;
            }
        }
        for (int64_t row = top; row < bottom; row += kBlock) {
          const int rows = int(std::min<int64_t>(kBlock, bottom - row));
          const T* const rows_at = static_cast<const T*>(p.x) + row * p.in_channels + slice.start;
          const T* const ahead = begin == 0 && row + kBlock < part.last_row ? rows_at + int64_t(kBlock) * p.in_channels : nullptr;
          Rows<Element, T> x{block, pitch, nullptr, p.in_channels};
          if (copies) {
            for (int r = 0; r < rows; ++r) {
              const float* gates = p.gate ? p.gate + (row + r) / p.pixels * p.in_channels + slice.start : nullptr;
              copy_row<W>(rows_at + int64_t(r) * p.in_channels, gates, slice.depth, block + int64_t(r) * pitch);
            }
          } else {
            x.at = reinterpret_cast<const Element*>(rows_at);
            x.pitch = elements;
          }
          for (int v = 0, taken = 0; v < count; v += taken) {
            taken = panel_vectors(count - v);
            const Panel<Element> panel{weights + int64_t(v) * W * slice.elements, scale + v * W, shift + v * W, taken,
                                       first + v * W};
            float* waiting = slices == 1 ? nullptr : partial + (v * (bottom - top) + (row - top) * taken) * W;
            x.ahead = v == 0 ? ahead : nullptr;
            run_panel<W, T>(p, panel, x, slice, row, rows, waiting);
          }
        }
      }
    }
  }
}

template <int W, typename T, typename Element> EFFNET_INLINE void run_or_pack(const Task& t) {
  if (t.packed) return pack_all<W, Element>(*t.params, t.packed);
  run_part<W, T, Element>(*t.params, t.part);
}

bool has_pairs(const Params& p, int width) {
#if defined(__x86_64__)
  return p.dtype == DType::bf16 && width == 16 && has_bf16_pairs();
#endif
  return false;
}

template <int W> EFFNET_INLINE void run_dtype(const Task& t) {
  switch (t.params->dtype) {
    case DType::fp32: return run_or_pack<W, float, float>(t);
    case DType::fp16: return run_or_pack<W, fp16, float>(t);
    case DType::bf16: break;
  }
#if defined(__x86_64__)
  if constexpr (W == 16)
    if (has_pairs(*t.params, W)) return run_or_pack<W, bf16, Pair>(t);
#endif
  run_or_pack<W, bf16, float>(t);
}

EFFNET_PER_ISA(run, (const Task& t), run_dtype, (t))

// Panels of two vectors, or three at the end where their number is odd.
int64_t panels_of(int64_t vectors) { return std::max<int64_t>(1, vectors / 2); }

struct Split {
  int64_t by_rows;
  int64_t by_channels;
};

// Threads that share channels each pack their weights, threads that share rows each multiply in their gates: the cheapest way to
// cut the output into as many rectangles as there are threads.
Split split_work(const Params& p, int threads) {
  const int64_t width = simd::width(), vectors = (p.out_channels + width - 1) / width;
  Split best{1, 1};
  double least = INFINITY;
  const bool gates_rows = p.gate && !gates_weights(p, 1);
  const int64_t panels = panels_of(vectors);
  for (int64_t by_channels = 1; by_channels <= std::min<int64_t>(threads, panels); ++by_channels) {
    const int64_t by_rows = std::min(threads / by_channels, (p.rows + kMostRows - 1) / kMostRows);
    const double mine = std::min<double>(vectors, 2 * ((panels - 1) / by_channels + 1) + vectors % 2),
                 rows = double((p.rows - 1) / by_rows + 1);
    const double cost = mine * double(width) * (p.packed ? 0. : kPackCost) + rows * (mine + (gates_rows ? kPrologueCost : 0.));
    if (cost < least) {
      least = cost;
      best = {by_rows, by_channels};
    }
  }
  return best;
}

}  // namespace

size_t packed_bytes(const Params& p) {
  const int width = simd::width(), depth = has_pairs(p, width) ? 2 : 1;
  const size_t channels = size_t((p.out_channels + width - 1) / width) * width;
  return channels * (2 + (p.in_channels - 1) / depth + 1) * sizeof(float);
}

void pack_cpu(const Params& p, void* packed) { run(Task{&p, {}, packed}); }

int panel_channels() { return 2 * simd::width(); }

void part_cpu(const Params& p, const Part& part) { run(Task{&p, part, nullptr}); }

void conv_bn_act_cpu(const Params& p) {
  const int64_t work = p.rows * p.in_channels * p.out_channels, width = simd::width();
  const int64_t vectors = (p.out_channels + width - 1) / width;
  const Split split = split_work(p, int(std::clamp<int64_t>(work / kGrain, 1, thread_count())));
  parallel_for(split.by_rows * split.by_channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t across = i % split.by_channels, down = i / split.by_channels;
      const auto row = [&](int64_t k) { return k == split.by_rows ? p.rows : p.rows * k / split.by_rows / 4 * 4; };
      const auto channel = [&](int64_t k) {
        return k == split.by_channels ? p.out_channels : int(panels_of(vectors) * k / split.by_channels) * panel_channels();
      };
      part_cpu(p, {row(down), row(down + 1), channel(across), channel(across + 1)});
    }
  });
}

}  // namespace effnet_fast::pointwise
