// Parallel loops of the CPU kernels. They run on torch's thread pool (csrc/binding/parallel.cpp), so that
// torch.set_num_threads is obeyed; the kernels themselves know nothing of torch.
#pragma once
#include <cstdint>

namespace effnet_fast {

// Whether this thread is to compute all by itself: others do the same with other images.
inline thread_local bool alone = false;
struct AloneGuard {
  const bool before = alone;
  AloneGuard() { alone = true; }
  ~AloneGuard() { alone = before; }
};

int thread_count();
void parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// body(begin, end) over ranges that cover [0, count), each at least `grain` long; a loop no longer than that stays on the
// calling thread, without a call into the pool.
template <typename F> void parallel_for(int64_t count, int64_t grain, const F& body) {
  if (count <= grain || alone) return body(int64_t{0}, count);
  parallel_ranges(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&body));
}

}  // namespace effnet_fast
