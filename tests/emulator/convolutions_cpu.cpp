// The CPU kernels of the convolutions under the sanitizers.
#include "cpu.h"

#include "conv/conv_cpu.cpp"
#include "depthwise/depthwise_cpu.cpp"
#include "kernels.h"

void emulated::depthwise_cpu(const effnet_fast::depthwise::ForwardParams& p) { effnet_fast::depthwise::forward_cpu(p); }
void emulated::conv_cpu(const effnet_fast::conv::Params& p) { effnet_fast::conv::conv_cpu(p); }
