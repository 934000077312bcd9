// Which kernels a chain takes.
#include "params.h"

namespace effnet_fast::chain {
namespace {

bool is_half(DType dtype) { return dtype == DType::bf16 || dtype == DType::fp16; }
template <typename... Pointers> bool on_16_bytes(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace

bool takes(const conv::Params& p) {
  return is_half(p.dtype) && p.weight_dtype == p.dtype && p.kernel == 3 && p.in_channels <= 3 && p.channels % 8 == 0 &&
         p.channels <= kMostStem && !p.residual && on_16_bytes(p.y) && p.batch * p.out_height * p.out_width <= kMostRows;
}

bool takes(const depthwise::ForwardParams& p) {
  return is_half(p.dtype) && p.weight_dtype == p.dtype && p.channels % 8 == 0 && on_16_bytes(p.x, p.y) && p.x_image % 8 == 0 &&
         p.x_row % 8 == 0 && p.x_pixel % 8 == 0 && p.x_row < kMostRows && p.x_pixel * p.width < int64_t(kMostRows) * 64 &&
         p.x_row * p.height < int64_t(kMostRows) * 64 && p.batch * p.out_height * p.out_width <= kMostRows;
}

bool takes(const squeeze_excite::GateParams& p) {
  return is_half(p.dtype) && p.channels % 8 == 0 && p.channels <= kMostChannels && p.reduced <= kMostChannels &&
         p.batch <= kMostRows && on_16_bytes(p.partial, p.reduce_weight, p.expand_weight);
}

bool takes(const pointwise::Params& p) {
  return is_half(p.dtype) && p.weight_dtype == p.dtype && p.in_channels % 8 == 0 && p.out_channels % 8 == 0 &&
         p.y_row == p.out_channels && on_16_bytes(p.x, p.weight, p.gate, p.residual, p.y) && p.rows <= kMostRows &&
         (!p.gate || p.rows / p.pixels * p.in_channels <= kMostChannels * 2);
}

bool takes(const pool::Params& p) {
  return is_half(p.dtype) && p.channels % 8 == 0 && on_16_bytes(p.x, p.y) && p.batch * p.pixels <= kMostRows;
}

}  // namespace effnet_fast::chain
