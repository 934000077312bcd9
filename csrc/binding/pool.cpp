// effnet_fast::global_average_pool.native. The schema is in effnet_fast/ops/pool.
#include "../pool/params.h"

#include "../inference/plan.h"
#include "chain.h"
#include "conv.h"

namespace effnet_fast::binding {
namespace {

constexpr const char* kPool = "global_average_pool";

void run_cpu(const pool::Params& p, const Tensor&) { inference::call(p, pool::average_cpu); }

#ifdef EFFNET_FAST_CUDA
// There is none but the chain's.
void run_cuda(const pool::Params& p, const Tensor& x) {
  check(recorded && recorded->take(p, x.get_device_index()), kPool,
        ": on CUDA a chain alone takes it, of half types, a multiple of ", "8 channels and at most 2^24 pixels");
}
#endif

template <auto run> void pool_out(const Tensor& x, const Tensor& y) {
  check(x.dim() == 4, kPool, ": x has shape ", shape_text(x), ", expected [N, C, H, W]");
  constexpr int64_t limit = std::numeric_limits<int>::max() / 64;
  for (int64_t i = 1; i < 4; ++i)
    check(x.size(i) >= 1 && x.size(i) < limit, kPool, ": x has shape ", shape_text(x), ", expected C, H and W from 1 to 2^25");
  check_shape(kPool, "y", y, {x.size(0), x.size(1)});
  check_same_device(kPool, "y", y, x);
  check_apart(kPool, "y", y, x);
  check(y.scalar_type() == x.scalar_type() && y.is_contiguous(), kPool, ": y must be contiguous in x's dtype");
  const Tensor images = as_channels_last(x);
  const pool::Params p{images.const_data_ptr(), y.mutable_data_ptr(), x.size(0),
                       x.size(2) * x.size(3),   int(x.size(1)),       dtype_of(kPool, "x", x)};
  if (p.batch > 0) run(p, x);
}

template <auto run> Tensor pool(const Tensor& x) {
  check(x.dim() == 4, kPool, ": x has shape ", shape_text(x), ", expected [N, C, H, W]");
  const Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  pool_out<run>(x, y);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("global_average_pool.native", TORCH_BOX(&pool<run_cpu>));
  m.impl("global_average_pool.native_out", TORCH_BOX(&pool_out<run_cpu>));
}

#ifdef EFFNET_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CUDA, m) {
  m.impl("global_average_pool.native", TORCH_BOX(&pool<run_cuda>));
  m.impl("global_average_pool.native_out", TORCH_BOX(&pool_out<run_cuda>));
}
#endif

}  // namespace
}  // namespace effnet_fast::binding
