// For the CPU kernels under the sanitizers: a machine whose vectors have $EMULATED_WIDTH floats, and dot products of bf16 if
// $EMULATED_BF16 is set. Included before the kernel.
#pragma once
#include <cstdlib>
#include <cstring>

namespace emulated {
inline bool supports(const char* feature) {
  if (std::strcmp(feature, "avx512bf16") == 0) return std::getenv("EMULATED_BF16") != nullptr;
  const int width = std::atoi(std::getenv("EMULATED_WIDTH"));
  return std::strncmp(feature, "avx512", 6) == 0 ? width >= 16 : width >= 8;
}
}  // namespace emulated

#define __builtin_cpu_supports(feature) emulated::supports(feature)
