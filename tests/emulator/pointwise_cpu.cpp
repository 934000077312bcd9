// The CPU kernel under the sanitizers.
#include "cpu.h"

#include "kernels.h"
#include "pointwise/pointwise_cpu.cpp"

void emulated::pointwise_cpu(const effnet_fast::pointwise::Params& p) { effnet_fast::pointwise::conv_bn_act_cpu(p); }
