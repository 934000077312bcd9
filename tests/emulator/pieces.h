#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

// Memory of so many floats for the pieces of a launch, which start as NaN.
struct Pieces {
  std::vector<std::unique_ptr<float[]>> all;
  float* operator()(int64_t floats) {
    float* const made = all.emplace_back(new float[floats]).get();
    std::fill_n(made, floats, NAN);
    return made;
  }
};
