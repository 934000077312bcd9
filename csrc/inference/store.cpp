#include "store.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

namespace effnet_fast::inference {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kChunk = 0;  // every overrun shows
#else
constexpr size_t kChunk = 8 << 20;  // of packed weights
#endif
constexpr size_t kHashed = 4096;  // bytes: two weights rarely begin alike, and what does is compared whole

}  // namespace

const void* Store::keep(size_t bytes, const std::function<void(void*)>& fill) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t lines = rounded_up(bytes, kLine);
  if (!packed_ || packed_->bytes() < lines) {
    held_ -= packed_ ? packed_->bytes() : 0;
    packed_.reset();
    packed_ = std::make_unique<Memory>(lines);
    held_ += packed_->bytes();
  }
  char* const packed = packed_->data();
  memset(packed, 0, lines);  // what fill leaves out would differ
  fill(packed);
  const size_t hash = std::hash<std::string_view>()({packed, std::min(bytes, kHashed)});
  for (auto [at, last] = kept_.equal_range(hash); at != last; ++at)
    if (at->second.second == bytes && memcmp(at->second.first, packed, bytes) == 0) return at->second.first;
  if (lines > left_) {
    chunks_.emplace_back(std::max(lines, kChunk));
    next_ = chunks_.back().data();
    left_ = chunks_.back().bytes();
    held_ += left_;
  }
  const char* const kept = static_cast<const char*>(memcpy(next_, packed, bytes));
  kept_.insert({hash, {kept, bytes}});
  next_ += lines;
  left_ -= lines;
  return kept;
}

std::unique_ptr<Memory> Store::acquire(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < free_.size(); ++i)
    if (free_[i]->bytes() >= bytes) {
      std::swap(free_[i], free_.back());
      auto memory = std::move(free_.back());
      free_.pop_back();
      return memory;
    }
  if (!free_.empty()) {  // too small: a larger one takes its place
    held_ -= free_.back()->bytes();
    free_.pop_back();
  }
  auto memory = std::make_unique<Memory>(bytes);
  held_ += memory->bytes();
  return memory;
}

void Store::release(std::unique_ptr<Memory> memory) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(memory));
}

size_t Store::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return held_;
}

}  // namespace effnet_fast::inference
