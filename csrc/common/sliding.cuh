// A window that slides down rows, one row after the other, with the loop unrolled so that each row's place is a constant.
#pragma once
#include "cuda.h"

namespace effnet_fast {

__host__ __device__ constexpr int floor_mod(int a, int b) { return (a % b + b) % b; }
__host__ __device__ constexpr bool divides(int a, int b) { return floor_mod(b, a) == 0; }

// Of `live` output rows that are in the making, the place of the one whose tap row u is input row i; stride divides i - u.
__host__ __device__ constexpr int slot_of(int i, int u, int stride, int live) {
  return floor_mod((i - u + 16 * stride) / stride - 16, live);
}

}  // namespace effnet_fast
