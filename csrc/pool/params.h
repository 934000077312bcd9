// What the global average pool is given, and the function that starts it.
#pragma once
#include <cstdint>

#include "../common/dtype.h"

namespace effnet_fast::pool {

// y = the mean of x over its pixels. Everything is contiguous, of any alignment and of type dtype.
struct Params {
  const void* x;  // [batch, pixels, channels]
  void* y;        // [batch, channels]
  int64_t batch, pixels;
  int channels;
  DType dtype;
};

void average_cpu(const Params& p);

}  // namespace effnet_fast::pool
