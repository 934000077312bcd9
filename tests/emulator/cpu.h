// Compiles a CPU kernel as on a machine whose vectors have $EMULATED_WIDTH floats.
#pragma once
#include <cstdlib>
#include <cstring>

namespace emulated {
inline bool supports(const char* feature) {
  const int width = std::atoi(std::getenv("EMULATED_WIDTH"));
  return std::strncmp(feature, "avx512", 6) == 0 ? width >= 16 : width >= 8;
}
}  // namespace emulated

#define __builtin_cpu_supports(feature) emulated::supports(feature)
