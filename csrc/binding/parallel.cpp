// common/parallel.h on torch's thread pool.
#include "../common/parallel.h"

#include "torch.h"

namespace effnet_fast {

int thread_count() { return alone ? 1 : int(torch::stable::get_num_threads()); }

void parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

}  // namespace effnet_fast
