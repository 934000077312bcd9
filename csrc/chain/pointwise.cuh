// A 1x1 convolution in a chain: a warp takes a tile of 16 pixels x 16 or 32 channels, or a part of its depth, and adds up with
// others in shared memory.
//
// There is no ring and no ldmatrix: 32 input channels are two products, and in which order a product takes them is free as long as
// both sides take the same, so that a lane loads 8 in a row of its own pixel, and of its own row of the weight, straight into the
// fragments. Which column of the fragment is which channel is free too: a lane writes 4 or 8 in a row.
#pragma once
#include "step.cuh"

namespace effnet_fast::chain {

// Of input channels, 32 each that a tile of `width` times 8 channels has under way at once.
__host__ __device__ constexpr int ahead(int width) { return width == 4 ? 2 : 4; }
// Memory of a 1x1 convolution: sums of warps that share a tile, then the gates.
__host__ __device__ __forceinline__ int gates_at(const Step& step) { return step.parts > 1 ? kThreads * step.width * 16 : 0; }

template <typename T, int kWidth, typename Wait>
__device__ __forceinline__ void pointwise_step(const Step& step, char* memory, const Wait& wait) {
  constexpr int kAhead = ahead(kWidth);
  const pointwise::Params& p = step.pointwise;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int C = p.in_channels, K = p.out_channels, rows = int(p.rows), pixels = int(p.pixels);
  const int part = warp % step.parts, together = kWarps / step.parts;  // tiles that a block has under way at once
  const int chunks = ceil_div(C, 32), each = ceil_div(chunks, step.parts);
  const int first_chunk = part * each, last_chunk = min(chunks, first_chunk + each);
  const int share = ceil_div(step.items, int(gridDim.x)), first = blockIdx.x * share, last = min(first + share, step.items);
  const Ending ending = ending_of(p.activation);
  const Vec<uint32_t, 4> zeros{};

  uint32_t* const gates = reinterpret_cast<uint32_t*>(memory + gates_at(step));  // of T, [images][C]

  Affine norm{};  // of channel `lane` of the tile's
  Vec<uint32_t, 4> a[kAhead][2], b[kAhead][kWidth];
  int tile, row, column;  // the lane's: rows g and g + 8 of 16 from `row` on, 2 kWidth channels from `column` on
  const T *x[2], *weight;
  int images[2];  // of these rows
  // mma's column g of product t is channel 2 t + g % 2 of those of lane g / 2.
  auto load_b = [&](int chunk) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
#pragma unroll
      for (int t = 0; t < kWidth; ++t) {
        const int c = (chunk + u) * 32 + q * 8;
        const bool real = chunk + u < last_chunk && c < C;
        b[u][t] = real ? load<4>(reinterpret_cast<const uint32_t*>(weight + (2 * t * C + c))) : zeros;
      }
  };
  auto load_a = [&](int chunk) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int c = (chunk + u) * 32 + q * 8;
        a[u][h] = chunk + u < last_chunk && c < C ? load<4>(reinterpret_cast<const uint32_t*>(x[h] + c)) : zeros;
      }
  };
  for (int base = first; base < last || base == first; base += together) {
    tile = base + warp / step.parts;
    const bool works = tile < last;
    if (works) {
      row = tile / step.across * 16;
      const int tile_column = tile % step.across * 8 * kWidth;
      column = tile_column + q * 2 * kWidth;
      const int weight_row = min(tile_column + g / 2 * 2 * kWidth, K - 2 * kWidth) + g % 2;
      weight = pin_global(static_cast<const T*>(p.weight) + int64_t(weight_row) * C);
      load_b(first_chunk);
      if (part == 0) norm = before_silu<T>(fold_norm(p, min(tile_column + lane, K - 1)), ending.silu);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int my_row = min(row + g + 8 * h, rows - 1);
        x[h] = pin_global(static_cast<const T*>(p.x) + int64_t(my_row) * C);
        images[h] = my_row / pixels;
      }
    }
    if (base == first) wait();
    Vec<uint32_t, kWidth> rest[2] = {};
    if (works) {
      load_a(first_chunk);
      if (p.residual && part == 0 && column < K)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          rest[h] = load<kWidth>(reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.residual) +
                                                                   (int64_t(min(row + g + 8 * h, rows - 1)) * K + column)));
    }
    if (base == first && p.gate) {
      for (int i = threadIdx.x * 4; i < rows / pixels * C; i += kThreads * 4) {
        const Vec<float, 4> v = load<4>(pin_global(p.gate + i));
        store(gates + i / 2, Vec<uint32_t, 2>{round_pair<T>(v.at[0], v.at[1]), round_pair<T>(v.at[2], v.at[3])});
      }
      __syncthreads();  // the gates are there
    }
    float acc[kWidth][4] = {};
    for (int chunk = first_chunk; works && chunk < last_chunk; chunk += kAhead) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (chunk + u >= last_chunk) break;
        const int c = (chunk + u) * 32 + q * 8;
        if (p.gate)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Vec<uint32_t, 4> gate = load<4>(gates + (images[h] * C + min(c, C - 8)) / 2);  // past the end x is zero
#pragma unroll
            for (int e = 0; e < 4; ++e) a[u][h].at[e] = multiply_pair<T>(a[u][h].at[e], gate.at[e]);
          }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t both[4] = {a[u][0].at[2 * half], a[u][1].at[2 * half], a[u][0].at[2 * half + 1], a[u][1].at[2 * half + 1]};
#pragma unroll
          for (int t = 0; t < kWidth; ++t) mma_k16(T(), acc[t], both, b[u][t].at[2 * half], b[u][t].at[2 * half + 1]);
        }
      }
      if (chunk + kAhead < last_chunk) load_a(chunk + kAhead), load_b(chunk + kAhead);
    }
    if (step.parts > 1) {
      float* const sums = reinterpret_cast<float*>(memory) + lane * 4;  // [warp][product][lane][4]
      auto place = [&](int of, int t) { return sums + (of * kWidth + t) * 32 * 4; };
      if (base != first) __syncthreads();  // those of the tiles before are read
      if (part > 0)
#pragma unroll
        for (int t = 0; t < kWidth; ++t) store(place(warp, t), Vec<float, 4>{acc[t][0], acc[t][1], acc[t][2], acc[t][3]});
      __syncthreads();
      for (int other = 1; part == 0 && other < step.parts; ++other)
#pragma unroll
        for (int t = 0; t < kWidth; ++t) {
          const Vec<float, 4> v = load<4>(place(warp + other, t));
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[t][e] += v.at[e];
        }
    }
    if (part > 0 || !works) continue;
    Vec<uint32_t, kWidth> out[2];
#pragma unroll
    for (int t = 0; t < kWidth; ++t) {
      float scale[2], shift[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[i] = __shfl_sync(0xffffffffu, norm.scale, (q * kWidth + t) * 2 + i);
        shift[i] = __shfl_sync(0xffffffffu, norm.shift, (q * kWidth + t) * 2 + i);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v0 = acc[t][2 * h] * scale[0] + shift[0], v1 = acc[t][2 * h + 1] * scale[1] + shift[1];
        end<T>(ending, v0, v1);
        if (p.residual) v0 += value_of<T>(rest[h], 2 * t), v1 += value_of<T>(rest[h], 2 * t + 1);
        out[h].at[t] = round_pair<T>(v0, v1);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (column < K && row + g + 8 * h < rows)
        store(reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + (int64_t(row + g + 8 * h) * K + column)), out[h]);
  }
}

// Clocks that a 1x1 convolution takes, by what binds it: trips to L2, of which a tile has one for each kAhead * 32 input channels;
// the bytes that a multiprocessor reads; and the sums of warps that share a tile.
inline double pointwise_clocks(const pointwise::Params& p, int width, int parts, int blocks) {
  constexpr double kTrip = 600, kBytesAClock = 32, kMeeting = 150, kSum = 8;
  const int chunks = ceil_div(p.in_channels, 32), each = ceil_div(chunks, parts);
  const int64_t tiles = ceil_div(p.rows, int64_t{16}) * ceil_div(p.out_channels, 8 * width),
                share = ceil_div(tiles, int64_t(blocks));
  const int64_t rounds = ceil_div(share * parts, int64_t(kWarps));
  const double bytes = double(share) * chunks * 64 * (16 + 8 * width);
  const double sums = parts > 1 ? kMeeting + kSum * width * parts : 0;
  return double(rounds) * (ceil_div(each, ahead(width)) * kTrip + sums) + bytes / kBytesAClock;
}

inline int plan_pointwise(Step& step, int blocks) {
  const pointwise::Params& p = step.pointwise;
  double least = INFINITY;
  for (int width = 2; width <= 4; width *= 2)
    for (int parts = 1; parts <= std::min(kWarps, ceil_div(p.in_channels, 32)); parts *= 2) {
      const double clocks = pointwise_clocks(p, width, parts, blocks);
      if (clocks >= least) continue;
      least = clocks;
      step.width = width;
      step.parts = parts;
    }
  step.across = ceil_div(p.out_channels, 8 * step.width);
  step.items = int(ceil_div(p.rows, int64_t{16})) * step.across;
  return gates_at(step) + (p.gate ? int(p.rows / p.pixels) * p.in_channels * 2 : 0);
}

}  // namespace effnet_fast::chain
