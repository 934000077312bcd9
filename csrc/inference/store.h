// What the plans of one network have in common: its packed weights, and memory for the images that are being computed.
#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../common/memory.h"

namespace effnet_fast::inference {

// Any number of threads may use it at the same time.
class Store {
 public:
  // Where `bytes` bytes lie that fill(memory) writes, at a multiple of kLine. Equal ones are kept once: a network's weights are
  // packed alike for images of every shape.
  const void* keep(size_t bytes, const std::function<void(void*)>& fill);

  // Memory of at least so many bytes, which nobody else has until it is given back.
  std::unique_ptr<Memory> acquire(size_t bytes);
  void release(std::unique_ptr<Memory> memory);

  size_t bytes() const;  // of all that it holds

 private:
  mutable std::mutex mutex_;
  std::unique_ptr<Memory> packed_;  // what is being packed
  std::vector<Memory> chunks_;
  char* next_ = nullptr;  // in the last of them, with so many bytes left
  size_t left_ = 0, held_ = 0;
  std::unordered_multimap<size_t, std::pair<const char*, size_t>> kept_;  // by a hash of how they begin
  std::vector<std::unique_ptr<Memory>> free_;
};

}  // namespace effnet_fast::inference
