// effnet_fast::squeeze_excite_gate.native. The schema is in effnet_fast/ops/squeeze_excite.
#include "../squeeze_excite/params.h"

#include <limits>

#include "../inference/plan.h"
#include "chain.h"
#include "torch.h"

namespace effnet_fast::binding {
namespace {

constexpr const char* kGate = "squeeze_excite_gate";

// Checks the arguments and calls run(params, device) to write `gate`, [N, C] fp32.
template <typename Run> void write_gate(const Tensor& partial, int64_t count, const Tensor& reduce_weight,
                                        const OptionalTensor& reduce_bias, const Tensor& expand_weight,
                                        const OptionalTensor& expand_bias, const Text& activation, const Tensor& gate,
                                        const Run& run) {
  check(partial.dim() == 3, kGate, ": partial has shape ", shape_text(partial), ", expected [N, P, C]");
  check(partial.scalar_type() == ScalarType::Float, kGate, ": partial must be float32");
  check(reduce_weight.dim() == 4, kGate, ": reduce_weight has shape ", shape_text(reduce_weight), ", expected [R, C, 1, 1]");
  const int64_t batch = partial.size(0), pieces = partial.size(1), channels = partial.size(2), reduced = reduce_weight.size(0);
  constexpr int64_t limit = std::numeric_limits<int>::max() / 64;
  check(pieces >= 1 && pieces < limit && channels >= 1 && channels < limit && reduced >= 1 && reduced < limit, kGate,
        ": P, C and R must be at least 1 and below 2^25, got P=", pieces, ", C=", channels, ", R=", reduced);
  check(count >= 1, kGate, ": count must be positive, got ", count);
  check_shape(kGate, "gate", gate, {batch, channels});
  check_same_device(kGate, "gate", gate, partial);
  check_apart(kGate, "gate", gate, partial);
  check(gate.scalar_type() == ScalarType::Float && gate.is_contiguous(), kGate, ": gate must be contiguous float32");

  const auto read = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
    check_shape(kGate, name, t, shape);
    check_same_device(kGate, name, t, partial);
    return as_parameter(t);
  };
  const Tensor sums = as_contiguous(partial);
  const Tensor reduce = read("reduce_weight", reduce_weight, {reduced, channels, 1, 1});
  const DType dtype = dtype_of(kGate, "reduce_weight", reduce);
  const auto read_alike = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
    check(t.scalar_type() == reduce_weight.scalar_type(), kGate, ": ", name, " must have the dtype of reduce_weight");
    return read(name, t, shape);
  };
  const auto read_optional = [&](const char* name, const OptionalTensor& t, int64_t size) {
    return t ? OptionalTensor(read_alike(name, *t, {size})) : std::nullopt;
  };
  const Tensor expand = read_alike("expand_weight", expand_weight, {channels, reduced, 1, 1});
  const OptionalTensor reduce_shift = read_optional("reduce_bias", reduce_bias, reduced);
  const OptionalTensor expand_shift = read_optional("expand_bias", expand_bias, channels);

  squeeze_excite::GateParams p{};
  p.partial = static_cast<const float*>(sums.const_data_ptr());
  p.reduce_weight = reduce.const_data_ptr();
  p.reduce_bias = reduce_shift ? reduce_shift->const_data_ptr() : nullptr;
  p.expand_weight = expand.const_data_ptr();
  p.expand_bias = expand_shift ? expand_shift->const_data_ptr() : nullptr;
  p.gate = static_cast<float*>(gate.mutable_data_ptr());
  p.batch = batch;
  p.pieces = int(pieces);
  p.channels = int(channels);
  p.reduced = int(reduced);
  p.count = float(count);
  p.activation = activation_of(kGate, activation);
  p.dtype = dtype;
  if (batch > 0) run(p, partial.get_device_index());
}

void run_cpu(const squeeze_excite::GateParams& p, int32_t) { inference::call(p, squeeze_excite::gate_cpu); }

#ifdef EFFNET_FAST_CUDA
void run_cuda(const squeeze_excite::GateParams& p, int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  start(p, squeeze_excite::gate_cuda, device);
}
#endif

template <auto run> void gate_out(const Tensor& partial, int64_t count, const Tensor& reduce_weight,
                                  const OptionalTensor& reduce_bias, const Tensor& expand_weight, const OptionalTensor& expand_bias,
                                  const Text& activation, const Tensor& gate) {
  write_gate(partial, count, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate, run);
}

template <auto run> Tensor gate(const Tensor& partial, int64_t count, const Tensor& reduce_weight,
                                const OptionalTensor& reduce_bias, const Tensor& expand_weight, const OptionalTensor& expand_bias,
                                const Text& activation) {
  check(partial.dim() == 3, kGate, ": partial has shape ", shape_text(partial), ", expected [N, P, C]");
  Tensor made = torch::stable::new_empty(partial, {partial.size(0), partial.size(2)});
  write_gate(partial, count, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, made, run);
  return made;
}

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CPU, m) {
  m.impl("squeeze_excite_gate.native", TORCH_BOX(&gate<run_cpu>));
  m.impl("squeeze_excite_gate.native_out", TORCH_BOX(&gate_out<run_cpu>));
}
#ifdef EFFNET_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CUDA, m) {
  m.impl("squeeze_excite_gate.native", TORCH_BOX(&gate<run_cuda>));
  m.impl("squeeze_excite_gate.native_out", TORCH_BOX(&gate_out<run_cuda>));
}
#endif

}  // namespace
}  // namespace effnet_fast::binding
