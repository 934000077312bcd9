// Memory exactly as long as an array that is copied into it, shifted by `misalign` elements, so that AddressSanitizer stands at its
// end.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

namespace py = pybind11;

// Memory of its own for an array, or for so many bytes.
class Buffer {
 public:
  Buffer(const py::array& source, int misalign) : Buffer(source.nbytes(), misalign * source.itemsize()) {
    std::memcpy(data(), source.data(), source.nbytes());
  }
  Buffer(size_t bytes, size_t offset) : memory_(static_cast<char*>(std::malloc(bytes + offset)), std::free), offset_(offset) {}
  char* data() const { return memory_.get() + offset_; }

 private:
  std::unique_ptr<char, void (*)(void*)> memory_;
  size_t offset_;
};

using OptionalArray = std::optional<py::array>;
inline std::optional<Buffer> optional_buffer(const OptionalArray& a, int misalign) {
  return a ? std::optional<Buffer>(std::in_place, *a, misalign) : std::nullopt;
}

void bind_training(py::module_& m);  // binding_training.cpp
void bind_chain(py::module_& m);     // binding_chain.cpp
