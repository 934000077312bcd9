// The stream comes from libtorch_cuda, which this module must not link: it also loads beside a CPU-only torch. The library is
// looked up, never loaded: a CUDA tensor exists only where torch has loaded it.
#include <dlfcn.h>

#include "torch.h"

namespace effnet_fast::binding {

void* current_cuda_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t device, void** stream);  // torch's header declares it under USE_CUDA only
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<GetStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  check(get_stream,
        "effnet_fast: this torch has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream, so CUDA kernels cannot run");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return stream;
}

}  // namespace effnet_fast::binding
