// A pointwise convolution and the depthwise one of what it makes, as one step of a plan.
#pragma once
#include "../depthwise/params.h"
#include "../pointwise/params.h"

namespace effnet_fast::inference {

// Of the depthwise convolution's images. Both have their weights packed; expand.y and depthwise.x mean nothing.
struct ExpandDepthwise {
  pointwise::Params expand;
  depthwise::ForwardParams depthwise;
};

// Whether they can be one step.
bool can_join(const pointwise::Params& expand, const depthwise::ForwardParams& depthwise);

void expand_depthwise_cpu(const ExpandDepthwise& p);

}  // namespace effnet_fast::inference
