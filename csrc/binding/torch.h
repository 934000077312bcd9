// The only door to torch: its stable ABI, under short names, and the checks every op makes of its arguments.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "../common/activation.h"
#include "../common/dtype.h"

namespace effnet_fast::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A string that an op is given. As std::string itself torch's boxing (2.13's stableivalue_conversions.h) makes two of each, and
// forgets one of them: 48 bytes a call.
struct Text : std::string {
  using std::string::string;
};

// Throws the message made of `parts`, which names the op and the argument.
template <typename... Parts> void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A tensor's shape for a message, written where the message is: a check that holds costs no string.
struct ShapeText {
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& out, const ShapeText& text) {
  out << "[";
  for (int64_t i = 0; i < text.tensor.dim(); ++i) out << (i ? ", " : "") << text.tensor.size(i);
  return out << "]";
}
inline ShapeText shape_text(const Tensor& t) { return {t}; }

inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && t.size(i++) == size;
  if (same) return;
  std::string expected;
  for (const int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  check(false, op, ": ", name, " has shape ", shape_text(t), ", expected [", expected, "]");
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check(t.is_cuda() == like.is_cuda() && t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op, ": ",
        name, " is on another device than the first argument");
}

// Throws where y, which a kernel writes, shares memory with `t`, which it reads.
inline void check_apart(const char* op, const char* name, const Tensor& y, const OptionalTensor& t) {
  if (!t || y.numel() == 0 || t->numel() == 0) return;
  const auto range = [](const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    const auto first = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    return std::pair(first, first + (last + 1) * tensor.element_size());
  };
  const auto written = range(y), read = range(*t);
  check(written.second <= read.first || read.second <= written.first, op, ": ", name, " shares memory with an argument");
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::fp32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::fp16;
    default: break;
  }
  check(false, op, ": ", name, " must be float32, bfloat16 or float16");
  return DType::fp32;
}

inline Activation activation_of(const char* op, const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "relu") return Activation::relu;
  if (name == "relu6") return Activation::relu6;
  check(name == "identity", op, ": activation must be silu, relu, relu6 or identity, got '", name, "'");
  return Activation::identity;
}

// To be called before a thread starts anything on CUDA but by chain.h: what its chain has comes first. On the CPU it does nothing.
void before_other_kernels();

inline Tensor as_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  before_other_kernels();
  return torch::stable::contiguous(t);
}

// A weight, a bias or a norm's vector as the kernels read it. They compute in fp32 and have no fp64 form.
inline Tensor as_parameter(const Tensor& t) {
  if (t.scalar_type() != ScalarType::Double) return as_contiguous(t);
  before_other_kernels();
  return as_contiguous(torch::stable::to(t, ScalarType::Float));
}

// The current stream of torch on that CUDA device, a cudaStream_t.
void* current_cuda_stream(int32_t device);

}  // namespace effnet_fast::binding

template <> struct torch::stable::detail::ToImpl<effnet_fast::binding::Text> {
  template <typename... Rest> static effnet_fast::binding::Text call(StableIValue value, Rest...) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    const bool known = !torch_string_length(handle, &length) && !torch_string_c_str(handle, &data);
    effnet_fast::binding::Text text(known ? data : "", known ? length : 0);
    if (torch_delete_string(handle) || !known) throw std::runtime_error("effnet_fast: an op's string argument cannot be read");
    return text;
  }
};
