// Memory that a thread of a CPU kernel keeps from call to call: fresh memory costs more to fault in than a small image to compute.
#pragma once
#include <cstddef>
#include <vector>

namespace effnet_fast {

// `floats` floats of the calling thread's, at a multiple of 64 bytes, with anything in them. One run of memory for each Owner, a
// type of the file that uses it; it is valid until that file asks again.
template <typename Owner> float* scratch(size_t floats) {
  struct alignas(64) Line {
    float at[16];
  };
  thread_local std::vector<Line> lines;
  if (lines.size() * 16 < floats) lines.resize((floats + 15) / 16);
  return lines.data()->at;
}

}  // namespace effnet_fast
