// What the plans of one network have in common: its packed weights, and memory for the images that are being computed.
#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace effnet_fast::inference {

constexpr size_t kLine = 64;

constexpr size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// At a multiple of 2 MB, in huge pages where the system has them. It is mapped, not malloc's: plans come and go in several threads,
// and what malloc keeps of them in its heaps was seen to grow to four times what is in use.
class Memory {
 public:
  explicit Memory(size_t bytes);
  char* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    size_t bytes;
    void operator()(char* p) const;
  };
  size_t bytes_;
  std::unique_ptr<char, Free> data_;
};

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
  std::unordered_multimap<size_t, std::pair<const char*, size_t>> kept_;  // by their hash
  std::vector<std::unique_ptr<Memory>> free_;
};

}  // namespace effnet_fast::inference
