// The CPU kernel under the sanitizers.
#include "cpu.h"

#include "conv/conv_cpu.cpp"
#include "kernels.h"

void emulated::conv_cpu(const effnet_fast::conv::Params& p) { effnet_fast::conv::conv_cpu(p); }
