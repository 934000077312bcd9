// The CPU kernel under the sanitizers.
#include "cpu.h"

#include "depthwise/depthwise_cpu.cpp"
#include "kernels.h"

void emulated::depthwise_cpu(const effnet_fast::depthwise::ForwardParams& p) { effnet_fast::depthwise::forward_cpu(p); }
