// The bfloat16 dot products of AVX-512 (vdpbf16ps): each lane of a vector adds two products of bf16 values to an fp32 sum, twice
// the multiply-adds of an fp32 instruction. Functions that use them are compiled for them and called only where they exist.
#pragma once
#include "../common/dtype.h"

namespace effnet_fast::pointwise {

// Two neighboring input channels of a row of x or of an output channel's weights, at any address.
struct Pair {
  bf16 low, high;
};

}  // namespace effnet_fast::pointwise

#if defined(__x86_64__)
#include <immintrin.h>
#define EFFNET_BF16_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace effnet_fast::pointwise {

inline bool has_bf16_pairs() {  // of a processor with the rest of AVX-512
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

// tile[R][V * 16] = or, if `adds`, += R rows of x times a packed panel, `depth` pairs deep. The result is rounded to bf16, so that
// sums need no chunks. R rows to come are fetched meanwhile, from `ahead` on, unless it is null.
template <int R, int V> EFFNET_BF16_PAIRS void multiply_pairs(const Pair* x, int pitch, const bf16* ahead, int64_t ahead_pitch,
                                                              const Pair* panel, int depth, bool adds, float* tile) {
  constexpr int kLine = 16;  // pairs
  __m512 sums[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sums[r][v] = adds ? _mm512_loadu_ps(tile + (r * V + v) * 16) : _mm512_setzero_ps();
  for (int i = 0; i < depth;) {
    if (ahead)
      for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * ahead_pitch + 2 * i, 0, 2);
    for (const int stop = ahead && i + kLine < depth ? i + kLine : depth; i < stop; ++i) {
      __m512bh weights[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(panel + (int64_t(i) * V + v) * 16);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        int pair;
        memcpy(&pair, x + int64_t(r) * pitch + i, sizeof(pair));
        const __m512bh values = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], weights[v], values);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(tile + (r * V + v) * 16, sums[r][v]);
}

// x[i] * gate[i] of the lanes `kept`, zero in the others. (GCC 12 takes the undefined lanes of the forms without a mask for a bug.)
EFFNET_BF16_PAIRS inline __m512 gated(const bf16* x, const float* gate, __mmask16 kept) {
  const __m512i bits = _mm512_maskz_cvtepu16_epi32(kept, _mm256_maskz_loadu_epi16(kept, x));
  return _mm512_maskz_mul_ps(kept, (__m512)_mm512_maskz_slli_epi32(kept, bits, 16), _mm512_maskz_loadu_ps(kept, gate));
}

// output[i] = bf16(x[i] * gate[i]) for i < count, padded with a zero to a whole pair. A null gate is one.
EFFNET_BF16_PAIRS inline void copy_pairs(const bf16* x, const float* gate, int count, Pair* output) {
  if (!gate) {
    memcpy(output, x, count * sizeof(bf16));
    if (count % 2) output[count / 2].high = {};
    return;
  }
  for (int i = 0; i < count; i += 32) {
    const __mmask32 kept = count - i < 32 ? (1u << (count - i)) - 1 : ~0u;
    const __m512bh pairs = _mm512_cvtne2ps_pbh(gated(x + i + 16, gate + i + 16, kept >> 16), gated(x + i, gate + i, kept));
    _mm512_mask_storeu_epi16(output + i / 2, kept | kept << 1, (__m512i)pairs);
  }
}

}  // namespace effnet_fast::pointwise
#endif
