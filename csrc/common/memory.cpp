#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace effnet_fast {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kPage = kLine;  // every overrun shows
#else
constexpr size_t kPage = 4 << 10, kHugePage = 2 << 20;
#endif
constexpr size_t kPatience = 4096;  // takes that a piece waits for: some steps of the deepest network

size_t whole_pages(size_t bytes) { return rounded_up(std::max<size_t>(bytes, 1), kPage); }

}  // namespace

#ifdef __SANITIZE_ADDRESS__
Memory::Memory(size_t bytes) : bytes_(whole_pages(bytes)), data_(nullptr, {bytes_}) {
  data_.reset(static_cast<char*>(std::aligned_alloc(kPage, bytes_)));
  if (!data_) throw std::bad_alloc();
}

void Memory::Free::operator()(char* p) const { std::free(p); }
#else
Memory::Memory(size_t bytes) : bytes_(whole_pages(bytes)), data_(nullptr, {bytes_}) {
  const size_t mapped = bytes_ + kHugePage;
  void* const at = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(at);
  const size_t before = rounded_up(reinterpret_cast<uintptr_t>(at), kHugePage) - reinterpret_cast<uintptr_t>(at);
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(begin + before + bytes_, kHugePage - before);
  madvise(begin + before, bytes_, MADV_HUGEPAGE);
  data_.reset(begin + before);
}

void Memory::Free::operator()(char* p) const { munmap(p, bytes); }
#endif

void Recycler::drop_oldest() {
  waiting_bytes_ -= waiting_.front().memory.bytes();
  waiting_.pop_front();
}

void* Recycler::take(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t wanted = whole_pages(bytes);
  // The one that was given back last: some of it may still be in a cache.
  const auto found = std::find_if(waiting_.rbegin(), waiting_.rend(), [&](const Waiting& w) { return w.memory.bytes() == wanted; });
  Memory memory = [&] {
    if (found != waiting_.rend()) {
      Memory kept = std::move(found->memory);
      waiting_.erase(std::prev(found.base()));
      waiting_bytes_ -= wanted;
      return kept;
    }
    while (!waiting_.empty() && taken_bytes_ + waiting_bytes_ + wanted > most_bytes_) drop_oldest();
    return Memory(wanted);
  }();
  taken_bytes_ += wanted;
  most_bytes_ = std::max(most_bytes_, taken_bytes_);
  ++takes_;
  while (!waiting_.empty() && waiting_.front().since + kPatience < takes_) drop_oldest();
  void* const data = memory.data();
  taken_.emplace(data, std::move(memory));
  return data;
}

void Recycler::give_back(void* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto node = taken_.extract(data);
  taken_bytes_ -= node.mapped().bytes();
  waiting_bytes_ += node.mapped().bytes();
  waiting_.push_back({std::move(node.mapped()), takes_});
}

}  // namespace effnet_fast
