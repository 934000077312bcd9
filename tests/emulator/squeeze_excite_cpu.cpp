// The gate's CPU kernel under the sanitizers, and a thread pool for all of them that runs its ranges one after another, last first.
#include "squeeze_excite/squeeze_excite_cpu.cpp"
#include "cpu.h"
#include "kernels.h"

namespace effnet_fast {
int thread_count() { return 3; }
void parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t size = std::max((count + 2) / 3, grain);
  for (int64_t begin = (count - 1) / size * size; begin >= 0; begin -= size) body(begin, std::min(begin + size, count), context);
}
}  // namespace effnet_fast

void emulated::squeeze_excite_gate_cpu(const effnet_fast::squeeze_excite::GateParams& p) {
  effnet_fast::squeeze_excite::gate_cpu(p);
}
